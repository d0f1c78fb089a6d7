package volume

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path"
	"slices"

	corev1 "k8s.io/api/core/v1"

	"golang.org/x/sys/unix"

	"github.com/skerry-io/skerry/api/edge"
)

// maxContent bounds the files of one volume, in bytes. A few bytes of an item
// can name a megabyte, so that a small pod spec could fill all memory.
const maxContent = 64 << 20

// content is the files of a volume by their clean paths.
type content map[string]file

type file struct {
	data []byte
	mode os.FileMode
	uid  *int64 // owner, root if nil
}

// setupContent makes a volume that has files, and its content current.
func (m *Manager) setupContent(p *podDir, pod *corev1.Pod, v *corev1.Volume, path string) error {
	files, err := m.collect(pod, v)
	if err != nil {
		if p.published(path) {
			m.noteStale(pod, v.Name, err.Error())
			return nil
		}
		return err
	}
	gid := fsGroup(pod)
	mode := uint32(0o777)
	if gid != nil {
		mode |= 0o2000
	}
	if v.ConfigMap != nil {
		err = m.makeDir(p, path, mode, gid)
	} else if err = m.makeDir(p, path, 0o755, nil); err == nil {
		err = m.mountTmpfs(p, path, tmpfs{mode: mode | 0o1000, gid: gid, flags: unix.MS_NOSUID | unix.MS_NODEV})
	}
	if err != nil {
		return err
	}
	root, err := p.root.OpenRoot(path)
	if err != nil {
		return err
	}
	defer root.Close()
	if err := m.makeMountPoints(root, pod, v.Name); err != nil {
		return err
	}
	w := &publisher{root: root, gid: gid, step: m.step}
	if err := w.publish(files); err != nil {
		return err
	}
	m.noteStale(pod, v.Name, "")
	return nil
}

// published reports whether the volume at path has content.
func (p *podDir) published(path string) bool {
	_, err := p.root.Stat(path + "/" + dataLink)
	return err == nil
}

// noteStale logs once that a volume keeps its last content, and why; "" says
// that it is current again.
func (m *Manager) noteStale(pod *corev1.Pod, volume, why string) {
	key := staleKey{pod.UID, volume}
	m.mu.Lock()
	was := m.stale[key]
	if why == "" {
		delete(m.stale, key)
	} else {
		m.stale[key] = why
	}
	m.mu.Unlock()
	log := m.config.Log.With("pod", pod.Namespace+"/"+pod.Name, "uid", pod.UID, "volume", volume)
	switch {
	case why != "" && why != was:
		log.Warn("volume keeps its last content", "reason", why)
	case why == "" && was != "":
		log.Info("volume is current again")
	}
}

// collect returns the files of a volume as they should be now.
func (m *Manager) collect(pod *corev1.Pod, v *corev1.Volume) (content, error) {
	c := &collector{m: m, pod: pod, files: content{}}
	var err error
	switch {
	case v.ConfigMap != nil:
		s := v.ConfigMap
		c.defaults(s.DefaultMode, s.DefaultUser)
		err = c.configMap(s.Name, s.Items, s.Optional)
	case v.Secret != nil:
		s := v.Secret
		c.defaults(s.DefaultMode, s.DefaultUser)
		err = c.secret(s.SecretName, s.Items, s.Optional)
	case v.DownwardAPI != nil:
		c.defaults(v.DownwardAPI.DefaultMode, v.DownwardAPI.DefaultUser)
		err = c.downwardAPI(v.DownwardAPI.Items)
	case v.Projected != nil:
		c.defaults(v.Projected.DefaultMode, v.Projected.DefaultUser)
		for i := range v.Projected.Sources {
			if err = c.projection(&v.Projected.Sources[i]); err != nil {
				break
			}
		}
	}
	if err != nil {
		return nil, err
	}
	return c.files, c.check()
}

// A collector puts the files of one volume together.
type collector struct {
	m     *Manager
	pod   *corev1.Pod
	mode  int32
	uid   *int64
	files content
	total int
}

func (c *collector) defaults(mode *int32, uid *int64) {
	c.mode, c.uid = 0o644, uid
	if mode != nil {
		c.mode = *mode
	}
}

// add puts a file. Of two with one path the last counts.
func (c *collector) add(path string, data []byte, mode *int32, uid *int64) error {
	clean, err := checkItem(path)
	if err != nil {
		return err
	}
	if c.total += len(data); c.total > maxContent {
		return fmt.Errorf("content is larger than %d bytes", maxContent)
	}
	f := file{data: data, mode: fileMode(uint32(c.mode)), uid: c.uid}
	if mode != nil {
		f.mode = fileMode(uint32(*mode))
	}
	if uid != nil {
		f.uid = uid
	}
	c.files[clean] = f
	return nil
}

// check refuses a path that is a file and, for another path, a directory.
func (c *collector) check() error {
	for name := range c.files {
		for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
			if _, ok := c.files[dir]; ok {
				return fmt.Errorf("invalid path: %s is a file and cannot contain %s", dir, name)
			}
		}
	}
	return nil
}

func (c *collector) configMap(name string, items []corev1.KeyToPath, optional *bool) error {
	o, err := c.m.config.Objects.ConfigMap(c.pod.Namespace, name)
	if err != nil {
		return forgive(&edge.ReferenceError{Kind: "configmap", Name: name, Err: err}, optional)
	}
	get := func(key string) ([]byte, bool) {
		if s, ok := o.Data[key]; ok {
			return []byte(s), true
		}
		b, ok := o.BinaryData[key]
		return b, ok
	}
	keys := slices.Collect(maps.Keys(o.Data))
	keys = slices.AppendSeq(keys, maps.Keys(o.BinaryData))
	return c.items(get, keys, items, optional, "configmap references non-existent config key")
}

func (c *collector) secret(name string, items []corev1.KeyToPath, optional *bool) error {
	o, err := c.m.config.Objects.Secret(c.pod.Namespace, name)
	if err != nil {
		return forgive(&edge.ReferenceError{Kind: "secret", Name: name, Err: err}, optional)
	}
	get := func(key string) ([]byte, bool) { b, ok := o.Data[key]; return b, ok }
	return c.items(get, slices.Collect(maps.Keys(o.Data)), items, optional, "references non-existent secret key")
}

// items adds the keys of an object that items select, or all of them.
func (c *collector) items(get func(string) ([]byte, bool), keys []string, items []corev1.KeyToPath, optional *bool, missing string) error {
	if len(items) == 0 {
		for _, key := range keys {
			data, _ := get(key)
			if err := c.add(key, data, nil, nil); err != nil {
				return err
			}
		}
		return nil
	}
	for _, item := range items {
		data, ok := get(item.Key)
		if !ok && isTrue(optional) {
			continue
		}
		if !ok {
			return fmt.Errorf("%s: %s", missing, item.Key)
		}
		if err := c.add(item.Path, data, item.Mode, item.User); err != nil {
			return err
		}
	}
	return nil
}

func (c *collector) downwardAPI(items []corev1.DownwardAPIVolumeFile) error {
	for _, item := range items {
		var value string
		var err error
		switch {
		case item.FieldRef != nil:
			value, err = c.m.config.Fields.Field(c.pod, item.FieldRef.FieldPath)
		case item.ResourceFieldRef != nil:
			value, err = c.m.config.Fields.Resource(c.pod, item.ResourceFieldRef.ContainerName, item.ResourceFieldRef)
		}
		if err == nil {
			err = c.add(item.Path, []byte(value), item.Mode, item.User)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (c *collector) projection(s *corev1.VolumeProjection) error {
	switch {
	case s.ConfigMap != nil:
		return c.configMap(s.ConfigMap.Name, s.ConfigMap.Items, s.ConfigMap.Optional)
	case s.Secret != nil:
		return c.secret(s.Secret.Name, s.Secret.Items, s.Secret.Optional)
	case s.DownwardAPI != nil:
		return c.downwardAPI(s.DownwardAPI.Items)
	case s.ServiceAccountToken != nil:
		return c.token(s.ServiceAccountToken)
	case s.ClusterTrustBundle != nil && isTrue(s.ClusterTrustBundle.Optional):
		return c.add(s.ClusterTrustBundle.Path, nil, nil, s.ClusterTrustBundle.User)
	case s.ClusterTrustBundle != nil:
		return errors.New("clusterTrustBundle sources are not supported on this site, unless they are optional")
	case s.PodCertificate != nil:
		return errors.New("podCertificate sources are not supported on this site")
	}
	return nil
}

// token adds a token, which only its user may read: the pod's user if all of
// its containers have the same, its group if it has one.
func (c *collector) token(s *corev1.ServiceAccountTokenProjection) error {
	expiration := int64(3600)
	if s.ExpirationSeconds != nil {
		expiration = *s.ExpirationSeconds
	}
	token, err := c.m.config.Objects.Token(c.pod, s.Audience, expiration)
	if err != nil {
		return &edge.ReferenceError{Kind: "token of service account", Name: c.pod.Spec.ServiceAccountName, Err: err}
	}
	uid := s.User
	if uid == nil {
		uid = c.uid
	}
	if uid == nil {
		uid = commonUser(c.pod)
	}
	mode := c.mode
	if uid != nil || fsGroup(c.pod) != nil {
		mode = 0o600
	}
	return c.add(s.Path, []byte(token), &mode, uid)
}

// commonUser is the user that all containers of pod run as, if the spec says.
func commonUser(pod *corev1.Pod) *int64 {
	var common *int64
	check := func(c *corev1.SecurityContext) bool {
		var uid *int64
		if s := pod.Spec.SecurityContext; s != nil {
			uid = s.RunAsUser
		}
		if c != nil && c.RunAsUser != nil {
			uid = c.RunAsUser
		}
		if uid == nil || common != nil && *common != *uid {
			return false
		}
		common = uid
		return true
	}
	for _, list := range [][]corev1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
		for i := range list {
			if !check(list[i].SecurityContext) {
				return nil
			}
		}
	}
	for i := range pod.Spec.EphemeralContainers {
		if !check(pod.Spec.EphemeralContainers[i].SecurityContext) {
			return nil
		}
	}
	return common
}

func isTrue(b *bool) bool { return b != nil && *b }

// forgive drops the error that an optional reference allows: that the object
// does not exist. One that has not been received may still exist.
func forgive(err error, optional *bool) error {
	if isTrue(optional) && errors.Is(err, edge.ErrAbsent) {
		return nil
	}
	return err
}
