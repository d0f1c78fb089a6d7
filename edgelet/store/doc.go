// Package store keeps everything that an edgelet must remember in one bbolt file:
// typed tables, bounded queues and a few single values, with group commit.
//
// # Schema
//
// The file is a tree of buckets. Names with a slash are one bucket each; buckets
// do not nest. Who owns a bucket gives its keys and values a type with [NewTable],
// [NewSealedTable] or [NewQueue]; this is the list of them all.
//
//	meta                        written by this package only, see [Meta]
//	  schema                    number of the newest migration that has run
//	  site                      name of the site
//	  epoch                     highest owner epoch that was seen (fencing)
//	  key                       data key, wrapped with the key of [Options]
//	desired/<kind>              the desired set: <edge.Key> -> edge.Object
//	sealed/desired/Secret       the same, encrypted
//	sealed/desired/Token        the same, encrypted
//	sealed/desired/other        objects of kinds that this version does not know
//	pods                        <pod UID> -> what the pod engine must remember
//	outbox                      <pod UID> -> the status that is not acknowledged yet
//	events                      queue of edge.Event
//	state                       "incomplete": something was lost and not sent again yet
//	images                      what the image parts remember
//	twins                       <namespace>/<device> -> twin document
//	mqtt/sessions, mqtt/retained, mqtt/inflight
//
// A queue is a bucket too: <sequence number, 8 bytes, big endian> -> item, and
// under the highest number its counters.
//
// # Values
//
//	1 byte    kind: 1 JSON, 2 JSON encrypted
//	4 bytes   CRC-32C of bucket, key, kind and content, big endian
//	content   JSON; or a nonce of 12 bytes and AES-256-GCM of the JSON, which
//	          authenticates bucket and key as well
//
// bbolt has no checksums on its data pages, so the CRC is what finds a flipped bit.
// Keys are never encrypted. bbolt does not clear the pages that it frees: what must
// not be found in the file after it was deleted belongs in a sealed table, which
// never writes it in clear.
//
// # Durability and wear
//
// A change is on disk when the call that makes it returns. Changes made at the
// same time share one commit; a lone writer waits for nothing but its own. A commit
// costs two fdatasync and two to four pages of 4 KiB: the meta page, the root, and
// the path to a leaf of a bucket that is too large to lie within the root. A change
// that changes nothing, because the same bytes are there already, is not written at
// all. [DB.Written] counts the bytes.
//
// # Damage
//
// [Open] reads the whole file before bbolt sees it, because bbolt answers most
// kinds of corruption with a panic and some with endless recursion. The time that
// takes is bounded by [Options.MaxSize]. In this order:
//
//   - The last commit is unreadable but the one before it is whole, as when a disk
//     lied about a flush: the store goes back by that one commit. It says so too
//     when this cannot be told from a commit that was never completed.
//   - Single values are damaged: they are dropped.
//   - Otherwise the file is renamed to <path>.corrupt-<time> and a new one is
//     begun; the two newest such files are kept.
//
// Each is logged as an error and listed by [DB.Damage]. When something was lost,
// what is not in the store must not be taken for unwanted until the cloud has sent
// its desired set. Damage that appears while the store is open ends it with
// [ErrCorrupt]: every later call fails until it is opened again.
//
// # Versions
//
// Migrations run in order, each in one transaction with its number, when the file
// is opened. A file of a higher number than this program knows is refused with
// [ErrSchema] and left alone.
package store
