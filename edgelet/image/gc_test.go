package image

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// disk is a runtime's store on a file system of 1000 bytes, 100 of them of others.
type disk struct {
	images     []*cri.Image
	containers []*cri.Container
	stuck      string // image that cannot be removed
	removed    []string
}

func (d *disk) ListImages(context.Context) ([]*cri.Image, error)         { return slices.Clone(d.images), nil }
func (d *disk) ListContainers(context.Context) ([]*cri.Container, error) { return d.containers, nil }
func (d *disk) RemoveImage(_ context.Context, image *cri.ImageSpec) error {
	if image.Image == d.stuck {
		return errors.New("stuck")
	}
	d.removed = append(d.removed, image.Image)
	d.images = slices.DeleteFunc(d.images, func(i *cri.Image) bool { return i.Id == image.Image })
	return nil
}
func (d *disk) ImageFsInfo(context.Context) (*cri.ImageFsInfoResponse, error) {
	return &cri.ImageFsInfoResponse{ImageFilesystems: []*cri.FilesystemUsage{{FsId: &cri.FilesystemIdentifier{Mountpoint: "/images"}}}}, nil
}
func (d *disk) statfs(path string) (capacity, available uint64, err error) {
	available = 900
	for _, i := range d.images {
		available -= i.Size
	}
	return 1000, available, nil
}

func image(id string, size uint64) *cri.Image {
	return &cri.Image{Id: id, Size: size, RepoTags: []string{"docker.io/library/" + id + ":latest"}}
}

func container(id string) *cri.Container {
	return &cri.Container{ImageRef: id, ImageId: id, Image: &cri.ImageSpec{Image: id}}
}

func collector(t *testing.T, d *disk, memory Memory) (*Collector, *[]string) {
	t.Helper()
	var events []string
	c, err := NewCollector(CollectorConfig{Store: d, Memory: memory, Statfs: d.statfs,
		Wanted: func() []string { return []string{"wanted"} },
		Event:  func(kind, reason, message string) { events = append(events, reason+" "+message) }})
	if err != nil {
		t.Fatal(err)
	}
	return c, &events
}

func TestTheLongestUnusedImageGoesFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &disk{images: []*cri.Image{image("a", 100), image("b", 100), image("c", 100), image("wanted", 200), image("run", 100)},
			containers: []*cri.Container{container("a"), container("run")}}
		d.images[4].Pinned = true
		c, events := collector(t, d, nil)
		collect := func() {
			t.Helper()
			if err := c.Collect(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		collect() // a is in use, b and c are new
		time.Sleep(time.Minute)
		d.containers = []*cri.Container{container("b"), container("run")}
		collect() // b has come into use, a has gone out of it
		time.Sleep(time.Minute)
		d.containers = d.containers[1:]
		collect() // nothing but run is in use
		time.Sleep(time.Hour)
		collect()
		if len(d.removed) != 0 {
			t.Fatalf("removed %v below the threshold", d.removed)
		}
		d.images = append(d.images, image("new", 150)) // 850 of 1000 bytes
		collect()
		if want := []string{"c"}; !slices.Equal(d.removed, want) {
			t.Errorf("removed %v, want %v", d.removed, want)
		}
		d.images = append(d.images, image("huge", 1)) // never mind its size
		d.images[len(d.images)-1].Size = 149
		collect()
		if want := []string{"c", "a"}; !slices.Equal(d.removed, want) {
			t.Errorf("removed %v, want %v", d.removed, want)
		}
		if len(*events) != 0 {
			t.Errorf("events %v", *events)
		}
	})
}

func TestWhatMustStayStays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &disk{images: []*cri.Image{image("run", 200), image("wanted", 200), image("pinned", 200), image("astuck", 100), image("small", 60)},
			containers: []*cri.Container{container("run")}, stuck: "astuck"}
		d.images[2].Pinned = true
		c, events := collector(t, d, nil)
		if err := c.Collect(t.Context()); err != nil || len(d.removed) != 0 {
			t.Errorf("removed %v, which are younger than two minutes; %v", d.removed, err)
		}
		if len(*events) != 1 || !strings.HasPrefix((*events)[0], "FreeDiskSpaceFailed Insufficient free disk space on the node's image filesystem (86% of 1000 bytes used).") {
			t.Errorf("events %v", *events)
		}
		time.Sleep(2 * time.Minute)
		if err := c.Collect(t.Context()); err == nil || !slices.Equal(d.removed, []string{"small"}) {
			t.Errorf("removed %v; %v", d.removed, err)
		}
		if freed, _ := c.RemoveUnused(t.Context()); freed != 0 || len(d.images) != 4 {
			t.Errorf("freed %d, left %v", freed, d.images)
		}
	})
}

func TestCollectorRemembersAcrossRestarts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &disk{images: []*cri.Image{image("a", 300), image("b", 300)}, containers: []*cri.Container{container("a")}}
		memory := &notes{}
		c, _ := collector(t, d, memory)
		for range 100 {
			time.Sleep(5 * time.Minute)
			if err := c.Collect(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		if memory.saves != 1 {
			t.Errorf("%d saves while nothing changed, want 1", memory.saves)
		}
		d.containers = nil
		c.Collect(t.Context())
		time.Sleep(time.Hour)
		again, _ := collector(t, d, memory)
		d.images = append(d.images, image("new", 200))
		if err := again.Collect(t.Context()); err != nil || !slices.Equal(d.removed, []string{"b"}) {
			t.Errorf("removed %v, want the one unused for longer; %v", d.removed, err)
		}
	})
}

func TestRunCollectsUntilItIsEnded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &disk{images: []*cri.Image{image("a", 300), image("b", 500)}}
		c, _ := collector(t, d, nil)
		ctx, cancel := context.WithTimeout(t.Context(), 11*time.Minute)
		defer cancel()
		if err := c.Run(ctx); !errors.Is(err, context.DeadlineExceeded) || len(d.removed) != 1 {
			t.Errorf("removed %v; %v", d.removed, err)
		}
	})
}

func TestThresholdsMustMakeSense(t *testing.T) {
	for _, config := range []CollectorConfig{{High: 50, Low: 60}, {High: 101, Low: 1}, {Low: -1}} {
		if _, err := NewCollector(config); err == nil {
			t.Errorf("%d to %d is accepted", config.High, config.Low)
		}
	}
}
