package cri

import (
	"context"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// PullImage pulls an image and returns the reference by which containers use it.
// Auth may be nil.
func (c *Client) PullImage(ctx context.Context, image *cri.ImageSpec, auth *cri.AuthConfig, sandbox *cri.PodSandboxConfig) (string, error) {
	req := &cri.PullImageRequest{Image: image, Auth: auth, SandboxConfig: sandbox}
	resp, err := do(ctx, operation{"pull image", image.GetImage(), c.config.PullTimeout}, c.images.PullImage, req)
	return resp.GetImageRef(), err
}

// ImageStatus describes an image that is present; nil if it is not.
func (c *Client) ImageStatus(ctx context.Context, image *cri.ImageSpec) (*cri.Image, error) {
	resp, err := do(ctx, c.query("status of image", image.GetImage()), c.images.ImageStatus, &cri.ImageStatusRequest{Image: image})
	return resp.GetImage(), gone(err)
}

// ListImages lists the images that are present.
func (c *Client) ListImages(ctx context.Context) ([]*cri.Image, error) {
	resp, err := do(ctx, c.query("list images", ""), c.images.ListImages, &cri.ListImagesRequest{})
	return resp.GetImages(), err
}

// RemoveImage removes an image with all its names. Idempotent.
func (c *Client) RemoveImage(ctx context.Context, image *cri.ImageSpec) error {
	_, err := do(ctx, c.change("remove image", image.GetImage()), c.images.RemoveImage, &cri.RemoveImageRequest{Image: image})
	return gone(err)
}

// ImageFsInfo tells where images and containers' writable layers are, and what
// they use.
func (c *Client) ImageFsInfo(ctx context.Context) (*cri.ImageFsInfoResponse, error) {
	return do(ctx, c.query("image file systems", ""), c.images.ImageFsInfo, &cri.ImageFsInfoRequest{})
}
