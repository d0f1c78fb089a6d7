// Package edge is the contract between a provider and an edgelet: what they say
// to each other over one session, as Go interfaces, an HTTP handler and a client.
//
// # The way of the data
//
// The provider calls [Edge], the edgelet calls [Cloud]; both are plain HTTP with
// JSON bodies through the same session, and [NewEdgeClient] and [NewCloudClient]
// are the same interfaces at the far end of it.
//
//	cloud to edge   Inventory   what does the site hold? (once, on connect)
//	                Apply       upserts and removals, durable when it returns
//	edge to cloud   Report      pod statuses, node facts, events; the answer
//	                            names what has been written to the API server
//
// # Level-triggered
//
// State travels as whole objects with versions. An [Object] is identified by its
// [Key]; the site holds it at a Version. On connect the provider computes the
// difference between what it wants and the inventory, and from then on keeps the
// difference at nothing. Losing, repeating or reordering a call is harmless: an
// upsert replaces, a removal of what is not held does nothing, a report carries
// the latest status with a sequence number, and an older number is ignored.
//
// A removal is always explicit. An empty set of changes changes nothing, and a
// provider whose caches have not synced sends nothing.
//
// # Fencing
//
// Every session carries an owner epoch in its hello (package tunnel). The edge
// remembers the highest that it has seen and refuses sessions of a lower one, so
// that of two providers that both believe they own a site, the newer wins.
//
// # Kinds
//
//	kind                name                  data
//	Pod                 name, UID set         corev1.Pod, its spec unresolved
//	ConfigMap, Secret   name                  corev1.ConfigMap, corev1.Secret; or absent
//	Token               see TokenName         Token
//	Services            ""                    []Service of the namespace
//	Cluster             ""                    Cluster
//	Node                site name             corev1.Node: metadata and spec only
//	RuntimeClass        name                  RuntimeClass; or absent
//
// A pod's identity is its UID: of two pods with one name, each is an object of
// its own.
package edge
