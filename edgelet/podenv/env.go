package podenv

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"

	corev1 "k8s.io/api/core/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/skerry-io/skerry/api/edge"
)

// Env returns the environment of a container of pod, whose addresses are ips:
// the services first, then envFrom, then env, each as declared; of several
// variables of one name the last counts. References in values see services and
// whatever was declared before them.
func (r *Resolver) Env(pod *corev1.Pod, container *corev1.Container, ips []string) ([]*cri.KeyValue, error) {
	services, err := r.services(pod)
	if err != nil {
		return nil, err
	}
	e := &environment{r: r, pod: pod, container: container, ips: ips, services: services, set: map[string]string{}}
	e.links = make(map[string]string, len(services))
	for _, v := range services {
		e.links[v.name] = v.value
	}
	for _, from := range container.EnvFrom {
		if err := e.addAll(from); err != nil {
			return nil, err
		}
	}
	for _, v := range container.Env {
		if err := e.add(v); err != nil {
			return nil, err
		}
	}
	return e.list(), nil
}

// Command returns the command and the arguments of container with references
// to env expanded.
func (r *Resolver) Command(container *corev1.Container, env []*cri.KeyValue) (command, args []string) {
	values := make(map[string]string, len(env))
	for _, kv := range env {
		values[kv.Key] = string(kv.Value)
	}
	lookup := func(name string) (string, bool) { v, ok := values[name]; return v, ok }
	// Beyond the bound arguments stay as written: the kernel refuses such a
	// command line in any case, and says so.
	total := 0
	expand := func(in []string) (out []string) {
		for _, s := range in {
			if total <= MaxTotal {
				s = Expand(s, lookup)
			}
			total += len(s)
			out = append(out, s)
		}
		return out
	}
	return expand(container.Command), expand(container.Args)
}

// An environment is one being put together.
type environment struct {
	r         *Resolver
	pod       *corev1.Pod
	container *corev1.Container
	ips       []string
	services  []variable
	links     map[string]string // services by name

	names []string          // of set, in order of their last declaration
	set   map[string]string // what the container declares
	total int               // bytes of all values that were ever put, so a bound of set
}

type variable struct{ name, value string }

func (e *environment) put(name, value string) error {
	if len(value) > MaxValue {
		return fmt.Errorf("environment variable %q: value is longer than the %d bytes that Linux accepts", name, MaxValue)
	}
	if e.total += len(name) + len(value); e.total > MaxTotal {
		return fmt.Errorf("environment is larger than the %d bytes that Linux accepts", MaxTotal)
	}
	if _, ok := e.set[name]; ok {
		e.names = slices.DeleteFunc(e.names, func(n string) bool { return n == name })
	}
	e.names = append(e.names, name)
	e.set[name] = value
	return nil
}

func (e *environment) lookup(name string) (string, bool) {
	if v, ok := e.set[name]; ok {
		return v, true
	}
	v, ok := e.links[name]
	return v, ok
}

func (e *environment) list() []*cri.KeyValue {
	env := make([]*cri.KeyValue, 0, len(e.links)+len(e.names))
	for _, v := range e.services {
		value, ok := e.links[v.name]
		if _, own := e.set[v.name]; ok && !own {
			env = append(env, &cri.KeyValue{Key: v.name, Value: []byte(value)})
			delete(e.links, v.name) // of two services that make one name, once
		}
	}
	for _, name := range e.names {
		env = append(env, &cri.KeyValue{Key: name, Value: []byte(e.set[name])})
	}
	return env
}

// addAll puts every key of a ConfigMap or Secret, in the order of the keys.
func (e *environment) addAll(from corev1.EnvFromSource) error {
	switch {
	case from.ConfigMapRef != nil:
		m, err := e.configMap(from.ConfigMapRef.Name)
		if err != nil {
			return forgive(err, from.ConfigMapRef.Optional)
		}
		for _, key := range slices.Sorted(maps.Keys(m.Data)) {
			if err := e.put(from.Prefix+key, m.Data[key]); err != nil {
				return err
			}
		}
	case from.SecretRef != nil:
		s, err := e.secret(from.SecretRef.Name)
		if err != nil {
			return forgive(err, from.SecretRef.Optional)
		}
		for _, key := range slices.Sorted(maps.Keys(s.Data)) {
			if err := e.put(from.Prefix+key, string(s.Data[key])); err != nil {
				return err
			}
		}
	}
	return nil
}

// add puts one declared variable.
func (e *environment) add(v corev1.EnvVar) error {
	switch {
	case v.Value != "":
		return e.put(v.Name, Expand(v.Value, e.lookup))
	case v.ValueFrom == nil:
		return e.put(v.Name, "")
	}
	value, err := e.valueFrom(v.ValueFrom)
	if errors.Is(err, errSkip) {
		return nil
	}
	if err != nil {
		return err
	}
	return e.put(v.Name, value)
}

// errSkip says that an optional reference leads nowhere: the variable is not set.
var errSkip = errors.New("not set")

func (e *environment) valueFrom(from *corev1.EnvVarSource) (string, error) {
	switch {
	case from.FieldRef != nil:
		return e.r.field(e.pod, from.FieldRef.FieldPath, e.ips)
	case from.ResourceFieldRef != nil:
		return e.r.resource(e.pod, e.container, from.ResourceFieldRef)
	case from.ConfigMapKeyRef != nil:
		ref := from.ConfigMapKeyRef
		m, err := e.configMap(ref.Name)
		if err != nil {
			return "", skip(err, ref.Optional)
		}
		value, ok := m.Data[ref.Key]
		if !ok {
			err := fmt.Errorf("couldn't find key %s in ConfigMap %s/%s%w", ref.Key, e.pod.Namespace, ref.Name, silent{edge.ErrAbsent})
			return "", skip(err, ref.Optional)
		}
		return value, nil
	case from.SecretKeyRef != nil:
		ref := from.SecretKeyRef
		s, err := e.secret(ref.Name)
		if err != nil {
			return "", skip(err, ref.Optional)
		}
		value, ok := s.Data[ref.Key]
		if !ok {
			err := fmt.Errorf("couldn't find key %s in Secret %s/%s%w", ref.Key, e.pod.Namespace, ref.Name, silent{edge.ErrAbsent})
			return "", skip(err, ref.Optional)
		}
		return string(value), nil
	case from.FileKeyRef != nil:
		return e.fileKey(from.FileKeyRef)
	}
	return "", nil
}

func (e *environment) fileKey(ref *corev1.FileKeySelector) (string, error) {
	if e.r.config.ReadVolumeFile == nil {
		return "", errors.New("fileKeyRef is not supported on this site")
	}
	f, err := e.r.config.ReadVolumeFile(e.pod, ref.VolumeName, ref.Path)
	if errors.Is(err, fs.ErrNotExist) && isTrue(ref.Optional) {
		return "", errSkip
	}
	if err != nil {
		return "", fmt.Errorf("environment file %q of volume %q: %w", ref.Path, ref.VolumeName, err)
	}
	defer f.Close()
	value, ok, err := readEnvFile(f, ref.Key)
	switch {
	case err != nil:
		return "", fmt.Errorf("environment file %q of volume %q: %w", ref.Path, ref.VolumeName, err)
	case ok && value != "":
		return value, nil
	case isTrue(ref.Optional):
		return "", errSkip
	}
	return "", fmt.Errorf("environment variable key %q not found in file %q of volume %q", ref.Key, ref.Path, ref.VolumeName)
}

func (e *environment) configMap(name string) (*corev1.ConfigMap, error) {
	m, err := e.r.config.Objects.ConfigMap(e.pod.Namespace, name)
	if err != nil {
		return nil, &edge.ReferenceError{Kind: "configmap", Name: name, Err: err}
	}
	return m, nil
}

func (e *environment) secret(name string) (*corev1.Secret, error) {
	s, err := e.r.config.Objects.Secret(e.pod.Namespace, name)
	if err != nil {
		return nil, &edge.ReferenceError{Kind: "secret", Name: name, Err: err}
	}
	return s, nil
}

// forgive drops an error that an optional reference allows.
func forgive(err error, optional *bool) error {
	if errors.Is(err, edge.ErrAbsent) && isTrue(optional) {
		return nil
	}
	return err
}

// skip makes errSkip of an error that an optional reference allows.
func skip(err error, optional *bool) error {
	if forgive(err, optional) == nil {
		return errSkip
	}
	return err
}

func isTrue(b *bool) bool { return b != nil && *b }

// silent wraps a sentinel without adding to the text, which is a kubelet's.
type silent struct{ err error }

func (s silent) Error() string { return "" }
func (s silent) Unwrap() error { return s.err }
