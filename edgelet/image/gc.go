package image

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/distribution/reference"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Store is the part of CRI that a collector needs.
type Store interface {
	ListImages(ctx context.Context) ([]*cri.Image, error)
	ListContainers(ctx context.Context) ([]*cri.Container, error)
	RemoveImage(ctx context.Context, image *cri.ImageSpec) error
	ImageFsInfo(ctx context.Context) (*cri.ImageFsInfoResponse, error)
}

// CollectorConfig configures a collector. Every field but Store may be left zero.
type CollectorConfig struct {
	Store  Store
	Memory Memory        // what outlives the process; default nothing does
	High   int           // percent of the file system from which on images go; default 85
	Low    int           // percent down to which they go; default 80
	MinAge time.Duration // that an image stays at least; default 2m
	Period time.Duration // between looks; default 5m

	// Wanted names the images that pods of this machine refer to, whether or not
	// a container has them, and that of the sandboxes. They stay: without a network
	// nothing brings them back. May be nil.
	Wanted func() []string

	Event  func(kind, reason, message string)                        // about the node; may be nil
	Statfs func(path string) (capacity, available uint64, err error) // in bytes; default the system's
	Log    *slog.Logger                                              // default slog.Default()
}

// A Collector removes unused images when space runs short. Its methods may be
// called concurrently.
type Collector struct {
	config CollectorConfig

	mu    sync.Mutex           // held during a collection, guards the following
	used  map[string]time.Time // by image id: when it was last in use, or first seen
	inUse map[string]bool      // by image id, at the last look
}

// NewCollector makes a collector and reads what an earlier one remembered.
func NewCollector(config CollectorConfig) (*Collector, error) {
	config.Memory = cmp.Or[Memory](config.Memory, forgetful{})
	config.High = cmp.Or(config.High, 85)
	config.Low = cmp.Or(config.Low, 80)
	config.MinAge = cmp.Or(config.MinAge, 2*time.Minute)
	config.Period = cmp.Or(config.Period, 5*time.Minute)
	config.Log = cmp.Or(config.Log, slog.Default())
	if config.Low > config.High || config.Low < 0 || config.High > 100 {
		return nil, fmt.Errorf("image collection from %d%% down to %d%%: want 0 <= low <= high <= 100", config.High, config.Low)
	}
	if config.Statfs == nil {
		config.Statfs = statfs
	}
	if config.Event == nil {
		config.Event = func(string, string, string) {}
	}
	used, err := config.Memory.Load(usedKey)
	if err != nil {
		return nil, fmt.Errorf("load image memory: %w", err)
	}
	if used == nil {
		used = map[string]time.Time{}
	}
	return &Collector{config: config, used: used, inUse: map[string]bool{}}, nil
}

// Run collects every period until ctx is done, and returns its cause then.
func (c *Collector) Run(ctx context.Context) error {
	ticker := time.NewTicker(c.config.Period)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-ticker.C:
			if err := c.Collect(ctx); err != nil && ctx.Err() == nil {
				c.config.Log.Warn("image collection failed", "error", err)
				c.config.Event(corev1.EventTypeWarning, "ImageGCFailed", clean(err.Error()))
			}
		}
	}
}

// Collect looks once, and removes images if the file system is too full.
func (c *Collector) Collect(ctx context.Context) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	unused, err := c.look(ctx, time.Now())
	if err != nil {
		return err
	}
	capacity, available, err := c.space(ctx)
	if err != nil {
		return err
	}
	percent := int(100 - min(available, capacity)*100/capacity)
	if percent < c.config.High {
		return nil
	}
	goal := capacity*uint64(100-c.config.Low)/100 - min(available, capacity)
	freed, err := c.remove(ctx, unused, goal)
	c.config.Log.Info("images collected", "used", fmt.Sprintf("%d%%", percent), "freed", freed, "wanted", goal)
	if err == nil && freed < goal {
		message := fmt.Sprintf("Insufficient free disk space on the node's image filesystem (%d%% of %d bytes used). "+
			"Failed to free sufficient space by deleting unused images (freed %d bytes).", percent, capacity, freed)
		c.config.Event(corev1.EventTypeWarning, "FreeDiskSpaceFailed", message)
	}
	return err
}

// RemoveUnused removes all images that may go, as a node short of disk wants.
func (c *Collector) RemoveUnused(ctx context.Context) (freed uint64, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	unused, err := c.look(ctx, time.Now())
	if err != nil {
		return 0, err
	}
	return c.remove(ctx, unused, ^uint64(0))
}

// look notes which images are in use now, and returns those that may go, the
// longest unused first. What it notes is saved when a use has begun or ended only.
func (c *Collector) look(ctx context.Context, now time.Time) ([]*cri.Image, error) {
	images, err := c.config.Store.ListImages(ctx)
	if err != nil {
		return nil, err
	}
	containers, err := c.config.Store.ListContainers(ctx)
	if err != nil {
		return nil, err
	}
	wanted := map[string]bool{}
	for _, container := range containers {
		wanted[container.ImageRef], wanted[container.ImageId] = true, true
		wanted[container.GetImage().GetImage()] = true
	}
	if c.config.Wanted != nil {
		for _, name := range c.config.Wanted() {
			wanted[name] = true
			if parsed, err := reference.ParseDockerRef(name); err == nil {
				wanted[parsed.String()] = true
			}
		}
	}
	changed := false
	present, inUse := map[string]bool{}, map[string]bool{}
	var unused []*cri.Image
	for _, image := range images {
		present[image.Id] = true
		_, known := c.used[image.Id]
		inUse[image.Id] = isWanted(image, wanted)
		if !known || c.inUse[image.Id] && !inUse[image.Id] {
			c.used[image.Id] = now
			changed = true
		}
		if inUse[image.Id] || image.Pinned || now.Sub(c.used[image.Id]) < c.config.MinAge {
			continue
		}
		unused = append(unused, image)
	}
	before := len(c.used)
	maps.DeleteFunc(c.used, func(id string, _ time.Time) bool { return !present[id] })
	c.inUse = inUse
	if changed || len(c.used) != before {
		if err := c.config.Memory.Save(usedKey, maps.Clone(c.used)); err != nil {
			return nil, fmt.Errorf("save image memory: %w", err)
		}
	}
	slices.SortFunc(unused, func(a, b *cri.Image) int {
		return cmp.Or(c.used[a.Id].Compare(c.used[b.Id]), cmp.Compare(a.Id, b.Id))
	})
	return unused, nil
}

func isWanted(image *cri.Image, wanted map[string]bool) bool {
	has := func(name string) bool { return wanted[name] }
	return has(image.Id) || slices.ContainsFunc(image.RepoTags, has) || slices.ContainsFunc(image.RepoDigests, has)
}

// remove removes images in order until goal bytes are free. One that cannot be
// removed does not keep the others.
func (c *Collector) remove(ctx context.Context, images []*cri.Image, goal uint64) (freed uint64, err error) {
	var errs []error
	for _, image := range images {
		if freed >= goal || ctx.Err() != nil {
			break
		}
		if err := c.config.Store.RemoveImage(ctx, &cri.ImageSpec{Image: image.Id}); err != nil {
			errs = append(errs, err)
			continue
		}
		c.config.Log.Info("image removed", "image", image.RepoTags, "id", image.Id, "bytes", image.Size)
		delete(c.used, image.Id)
		freed += image.Size
	}
	return freed, errors.Join(errs...)
}

// space is that of the file system which images are on.
func (c *Collector) space(ctx context.Context) (capacity, available uint64, err error) {
	info, err := c.config.Store.ImageFsInfo(ctx)
	if err != nil {
		return 0, 0, err
	}
	if len(info.ImageFilesystems) == 0 {
		return 0, 0, errors.New("the runtime names no image file system")
	}
	path := info.ImageFilesystems[0].GetFsId().GetMountpoint()
	capacity, available, err = c.config.Statfs(path)
	if err == nil && capacity == 0 {
		err = fmt.Errorf("image file system %s: no capacity", path)
	}
	return capacity, available, err
}

func statfs(path string) (capacity, available uint64, err error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(path, &fs); err != nil {
		return 0, 0, fmt.Errorf("image file system %s: %w", path, err)
	}
	size := uint64(fs.Bsize)
	return fs.Blocks * size, fs.Bavail * size, nil
}
