package cri

import (
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/types"
)

// A kind is what an id in the index stands for.
type kind int

const (
	sandboxes kind = iota
	containers
)

// An index knows the pod of each sandbox and container, so that events, which
// name only these, can be told of pods. What a list shows replaces what was known;
// so it is as large as the runtime's own lists.
type index struct {
	mu   sync.Mutex
	pods [2]map[string]entry // guarded by mu; by kind, then id
}

type entry struct {
	uid   types.UID
	added time.Time // zero if from a list
}

func newIndex() index {
	return index{pods: [2]map[string]entry{{}, {}}}
}

func (x *index) add(k kind, id string, uid types.UID) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.pods[k][id] = entry{uid, time.Now()}
}

// replace takes over a list that was asked for when it began. What has been added
// since may be missing in the list, and stays.
func (x *index) replace(k kind, pods map[string]types.UID, began time.Time) {
	x.mu.Lock()
	defer x.mu.Unlock()
	next := make(map[string]entry, len(pods))
	for id, old := range x.pods[k] {
		if !old.added.IsZero() && !old.added.Before(began) {
			next[id] = old
		}
	}
	for id, uid := range pods {
		next[id] = entry{uid: uid}
	}
	x.pods[k] = next
}

// find returns the pod of a sandbox or a container.
func (x *index) find(id string) (types.UID, bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, pods := range x.pods {
		if e, ok := pods[id]; ok && e.uid != "" {
			return e.uid, true
		}
	}
	return "", false
}
