package provider

import (
	"cmp"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/skerry-io/skerry/api/edge"
)

// A tokenRef is a service-account token that a pod's volumes ask for.
type tokenRef struct {
	account  string
	audience string
	seconds  int64
}

func (t tokenRef) key(namespace string, uid types.UID) edge.Key {
	return edge.Key{Kind: edge.KindToken, Namespace: namespace, Name: edge.TokenName(t.account, t.audience, t.seconds), UID: uid}
}

// defaultTokenSeconds is the life of a token whose volume does not say it.
const defaultTokenSeconds = 3600

// References are the objects that one pod needs at its site, each once, in order.
type references struct {
	secrets    []string
	configMaps []string
	tokens     []tokenRef
	class      string // runtime class, "" for none
}

// referencesOf collects what a pod refers to. It is pure.
func referencesOf(pod *corev1.Pod) references {
	var r references
	spec := &pod.Spec
	for _, s := range spec.ImagePullSecrets {
		r.secret(s.Name)
	}
	for i := range spec.InitContainers {
		r.environment(spec.InitContainers[i].EnvFrom, spec.InitContainers[i].Env)
	}
	for i := range spec.Containers {
		r.environment(spec.Containers[i].EnvFrom, spec.Containers[i].Env)
	}
	for i := range spec.EphemeralContainers {
		r.environment(spec.EphemeralContainers[i].EnvFrom, spec.EphemeralContainers[i].Env)
	}
	for i := range spec.Volumes {
		r.volume(&spec.Volumes[i], cmp.Or(spec.ServiceAccountName, "default"))
	}
	if spec.RuntimeClassName != nil {
		r.class = *spec.RuntimeClassName
	}
	slices.Sort(r.secrets)
	slices.Sort(r.configMaps)
	r.secrets, r.configMaps = slices.Compact(r.secrets), slices.Compact(r.configMaps)
	slices.SortFunc(r.tokens, func(a, b tokenRef) int {
		return cmp.Or(cmp.Compare(a.account, b.account), cmp.Compare(a.audience, b.audience), cmp.Compare(a.seconds, b.seconds))
	})
	r.tokens = slices.Compact(r.tokens)
	return r
}

func (r *references) secret(name string) {
	if name != "" {
		r.secrets = append(r.secrets, name)
	}
}

func (r *references) configMap(name string) {
	if name != "" {
		r.configMaps = append(r.configMaps, name)
	}
}

func (r *references) environment(from []corev1.EnvFromSource, env []corev1.EnvVar) {
	for _, f := range from {
		if f.SecretRef != nil {
			r.secret(f.SecretRef.Name)
		}
		if f.ConfigMapRef != nil {
			r.configMap(f.ConfigMapRef.Name)
		}
	}
	for _, e := range env {
		if e.ValueFrom == nil {
			continue
		}
		if ref := e.ValueFrom.SecretKeyRef; ref != nil {
			r.secret(ref.Name)
		}
		if ref := e.ValueFrom.ConfigMapKeyRef; ref != nil {
			r.configMap(ref.Name)
		}
	}
}

func (r *references) volume(v *corev1.Volume, account string) {
	switch {
	case v.Secret != nil:
		r.secret(v.Secret.SecretName)
	case v.ConfigMap != nil:
		r.configMap(v.ConfigMap.Name)
	case v.CSI != nil && v.CSI.NodePublishSecretRef != nil:
		r.secret(v.CSI.NodePublishSecretRef.Name)
	case v.Projected != nil:
		for _, source := range v.Projected.Sources {
			switch {
			case source.Secret != nil:
				r.secret(source.Secret.Name)
			case source.ConfigMap != nil:
				r.configMap(source.ConfigMap.Name)
			case source.ServiceAccountToken != nil:
				seconds := int64(defaultTokenSeconds)
				if s := source.ServiceAccountToken.ExpirationSeconds; s != nil {
					seconds = *s
				}
				r.tokens = append(r.tokens, tokenRef{account, source.ServiceAccountToken.Audience, seconds})
			}
		}
	}
}
