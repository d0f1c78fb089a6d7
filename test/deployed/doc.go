// Package deployed tests Skerry as the manifests install it: the provider is a pod
// of a cluster whose own node is a real kubelet, with the account, the rights and
// the image that users get, and a site joins it through its Service. The image is
// what make images has written, the manifests are applied as they are.
package deployed
