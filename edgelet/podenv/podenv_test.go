package podenv

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/skerry-io/skerry/api/edge"
)

// objects is what a site holds, by namespace/name; a nil object is known not to
// exist, one that is not there is unknown.
type objects struct {
	configMaps map[string]map[string]string
	secrets    map[string]map[string]string
	services   map[string][]edge.Service
	cluster    edge.Cluster
}

func (o *objects) ConfigMap(namespace, name string) (*corev1.ConfigMap, error) {
	data, ok := o.configMaps[namespace+"/"+name]
	if !ok {
		return nil, fmt.Errorf("ConfigMap: %w", edge.ErrUnknown)
	}
	if data == nil {
		return nil, fmt.Errorf("ConfigMap: %w", edge.ErrAbsent)
	}
	return &corev1.ConfigMap{Data: data}, nil
}

func (o *objects) Secret(namespace, name string) (*corev1.Secret, error) {
	data, ok := o.secrets[namespace+"/"+name]
	if !ok {
		return nil, fmt.Errorf("Secret: %w", edge.ErrUnknown)
	}
	if data == nil {
		return nil, fmt.Errorf("Secret: %w", edge.ErrAbsent)
	}
	s := &corev1.Secret{Data: map[string][]byte{}}
	for k, v := range data {
		s.Data[k] = []byte(v)
	}
	return s, nil
}

func (o *objects) Services(namespace string) ([]edge.Service, error) {
	s, ok := o.services[namespace]
	if !ok {
		return nil, fmt.Errorf("Services: %w", edge.ErrUnknown)
	}
	return s, nil
}

func (o *objects) Cluster() edge.Cluster { return o.cluster }

func resolver(o *objects) *Resolver {
	if o.services == nil {
		o.services = map[string][]edge.Service{"shop": nil}
	}
	return New(Config{
		Objects:  o,
		NodeName: "site-a",
		HostIPs:  func() []string { return []string{"192.0.2.7", "2001:db8::7"} },
		Allocatable: func() corev1.ResourceList {
			return corev1.ResourceList{
				corev1.ResourceCPU:              resource.MustParse("3500m"),
				corev1.ResourceMemory:           resource.MustParse("2Gi"),
				corev1.ResourceEphemeralStorage: resource.MustParse("10Gi"),
			}
		},
	})
}

func web() *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Name: "web-1", Namespace: "shop", UID: "u-1",
			Labels:      map[string]string{"app": "web", "app.kubernetes.io/tier": "front \"1\""},
			Annotations: map[string]string{"Example.com/Note": "two\nlines"},
		},
		Spec: corev1.PodSpec{
			NodeName: "site-a", ServiceAccountName: "robot",
			Containers: []corev1.Container{{Name: "main", Resources: corev1.ResourceRequirements{
				Requests: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("250m"), corev1.ResourceMemory: resource.MustParse("100Mi")},
				Limits:   corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("1250m"), "hugepages-2Mi": resource.MustParse("4Mi")},
			}}},
			InitContainers: []corev1.Container{{Name: "setup"}},
		},
	}
}

func text(env []*cri.KeyValue) string {
	var b strings.Builder
	for _, kv := range env {
		fmt.Fprintf(&b, "%s=%s\n", kv.Key, kv.Value)
	}
	return b.String()
}

func configKey(name, key string, optional bool) *corev1.EnvVarSource {
	return &corev1.EnvVarSource{ConfigMapKeyRef: &corev1.ConfigMapKeySelector{LocalObjectReference: corev1.LocalObjectReference{Name: name}, Key: key, Optional: &optional}}
}

func secretKey(name, key string, optional bool) *corev1.EnvVarSource {
	return &corev1.EnvVarSource{SecretKeyRef: &corev1.SecretKeySelector{LocalObjectReference: corev1.LocalObjectReference{Name: name}, Key: key, Optional: &optional}}
}

func configFrom(name, prefix string, optional bool) corev1.EnvFromSource {
	return corev1.EnvFromSource{Prefix: prefix, ConfigMapRef: &corev1.ConfigMapEnvSource{LocalObjectReference: corev1.LocalObjectReference{Name: name}, Optional: &optional}}
}

func secretFrom(name string, optional bool) corev1.EnvFromSource {
	return corev1.EnvFromSource{SecretRef: &corev1.SecretEnvSource{LocalObjectReference: corev1.LocalObjectReference{Name: name}, Optional: &optional}}
}

func field(path string) *corev1.EnvVarSource {
	return &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{APIVersion: "v1", FieldPath: path}}
}

func held() *objects {
	return &objects{
		configMaps: map[string]map[string]string{"shop/conf": {"b": "2", "a": "1"}, "shop/gone": nil},
		secrets:    map[string]map[string]string{"shop/keys": {"token": "s3cret\xff"}, "shop/gone": nil},
	}
}

func TestEnv(t *testing.T) {
	tests := map[string]struct {
		container corev1.Container
		want      string
		wantErr   string
		is        error
	}{
		"values expand what was declared before, in declared order": {
			container: corev1.Container{Env: []corev1.EnvVar{{Name: "Z", Value: "z"}, {Name: "A", Value: "$(Z)-$(LATER)-$$(Z)"}, {Name: "LATER", Value: "x"}}},
			want:      "Z=z\nA=z-$(LATER)-$(Z)\nLATER=x\n",
		},
		"of two of one name the last counts": {
			container: corev1.Container{Env: []corev1.EnvVar{{Name: "A", Value: "1"}, {Name: "B", Value: "$(A)"}, {Name: "A", Value: "2$(A)"}}},
			want:      "B=1\nA=21\n",
		},
		"envFrom takes all keys, prefixed, and env overrides": {
			container: corev1.Container{
				EnvFrom: []corev1.EnvFromSource{configFrom("conf", "P_", false), secretFrom("keys", false)},
				Env:     []corev1.EnvVar{{Name: "P_a", Value: "$(P_a)$(P_b)"}},
			},
			want: "P_b=2\ntoken=s3cret\xff\nP_a=12\n",
		},
		"values of references are literal": {
			container: corev1.Container{Env: []corev1.EnvVar{
				{Name: "C", ValueFrom: configKey("conf", "a", false)}, {Name: "S", ValueFrom: secretKey("keys", "token", false)}, {Name: "E"},
			}},
			want: "C=1\nS=s3cret\xff\nE=\n",
		},
		"fields of the pod": {
			container: corev1.Container{Env: []corev1.EnvVar{{Name: "IP", ValueFrom: field("status.podIP")}, {Name: "IPS", ValueFrom: field("status.podIPs")}}},
			want:      "IP=10.0.0.9\nIPS=10.0.0.9,fd00::9\n",
		},
		"optional references that lead nowhere are not set": {
			container: corev1.Container{
				EnvFrom: []corev1.EnvFromSource{configFrom("gone", "", true), secretFrom("gone", true)},
				Env: []corev1.EnvVar{
					{Name: "A", ValueFrom: configKey("gone", "k", true)}, {Name: "B", ValueFrom: configKey("conf", "k", true)},
					{Name: "C", ValueFrom: secretKey("gone", "k", true)}, {Name: "D", ValueFrom: secretKey("keys", "k", true)}, {Name: "E", Value: "e"},
				},
			},
			want: "E=e\n",
		},
		"a missing ConfigMap": {
			container: corev1.Container{Env: []corev1.EnvVar{{Name: "A", ValueFrom: configKey("gone", "k", false)}}},
			wantErr:   `configmap "gone" not found`, is: edge.ErrAbsent,
		},
		"a missing Secret in envFrom": {
			container: corev1.Container{EnvFrom: []corev1.EnvFromSource{secretFrom("gone", false)}},
			wantErr:   `secret "gone" not found`, is: edge.ErrAbsent,
		},
		"a missing key of a ConfigMap": {
			container: corev1.Container{Env: []corev1.EnvVar{{Name: "A", ValueFrom: configKey("conf", "k", false)}}},
			wantErr:   `couldn't find key k in ConfigMap shop/conf`, is: edge.ErrAbsent,
		},
		"a missing key of a Secret": {
			container: corev1.Container{Env: []corev1.EnvVar{{Name: "A", ValueFrom: secretKey("keys", "k", false)}}},
			wantErr:   `couldn't find key k in Secret shop/keys`, is: edge.ErrAbsent,
		},
		"what is not known yet is waited for, even if optional": {
			container: corev1.Container{EnvFrom: []corev1.EnvFromSource{configFrom("new", "", true)}},
			wantErr:   `configmap "new" has not been received yet`, is: edge.ErrUnknown,
		},
		"the same for one key": {
			container: corev1.Container{Env: []corev1.EnvVar{{Name: "A", ValueFrom: secretKey("new", "k", true)}}},
			wantErr:   `secret "new" has not been received yet`, is: edge.ErrUnknown,
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			env, err := resolver(held()).Env(web(), &tt.container, []string{"fd00::9", "10.0.0.9"})
			if tt.wantErr != "" {
				if err == nil || err.Error() != tt.wantErr || !errors.Is(err, tt.is) {
					t.Fatalf("Env error = %v, want %q that is %v", err, tt.wantErr, tt.is)
				}
				return
			}
			if err != nil || text(env) != tt.want {
				t.Errorf("Env = %q, %v, want %q", text(env), err, tt.want)
			}
		})
	}
}

func TestEnvIsBounded(t *testing.T) {
	// Each variable doubles the one before: unbounded, the last would have 2^40 bytes.
	c := corev1.Container{Env: []corev1.EnvVar{{Name: "V0", Value: "xx"}}}
	for i := range 40 {
		c.Env = append(c.Env, corev1.EnvVar{Name: fmt.Sprint("V", i+1), Value: fmt.Sprintf("$(V%d)$(V%[1]d)", i)})
	}
	if _, err := resolver(held()).Env(web(), &c, nil); err == nil || !strings.Contains(err.Error(), "longer than") {
		t.Errorf("Env = %v, want an error that a value is too long", err)
	}
	c.Env = []corev1.EnvVar{{Name: "A", Value: strings.Repeat("x", MaxValue)}}
	for i := range 60 {
		c.Env = append(c.Env, corev1.EnvVar{Name: fmt.Sprint("V", i), Value: "$(A)"})
	}
	if _, err := resolver(held()).Env(web(), &c, nil); err == nil || !strings.Contains(err.Error(), "larger than") {
		t.Errorf("Env = %v, want an error that the environment is too large", err)
	}
	c = corev1.Container{Args: make([]string, 10_000)}
	for i := range c.Args {
		c.Args[i] = "$(A)"
	}
	size := 0
	_, args := resolver(held()).Command(&c, []*cri.KeyValue{{Key: "A", Value: make([]byte, MaxValue)}})
	for _, a := range args {
		size += len(a)
	}
	if size > MaxTotal+2*MaxValue || len(args) != len(c.Args) {
		t.Errorf("Command returned %d arguments of %d bytes, want all and at most about %d bytes", len(args), size, MaxTotal)
	}
}

func TestServices(t *testing.T) {
	api := edge.Service{Name: "kubernetes", ClusterIP: "10.96.0.1", Ports: []edge.ServicePort{{Name: "https", Protocol: "TCP", Port: 443}}}
	apiText := "KUBERNETES_SERVICE_HOST=10.96.0.1\nKUBERNETES_SERVICE_PORT=443\nKUBERNETES_SERVICE_PORT_HTTPS=443\nKUBERNETES_PORT=tcp://10.96.0.1:443\n" +
		"KUBERNETES_PORT_443_TCP=tcp://10.96.0.1:443\nKUBERNETES_PORT_443_TCP_PROTO=tcp\nKUBERNETES_PORT_443_TCP_PORT=443\nKUBERNETES_PORT_443_TCP_ADDR=10.96.0.1\n"
	dns := edge.Service{Name: "a-b", ClusterIP: "fd00::1", Ports: []edge.ServicePort{{Protocol: "UDP", Port: 53}}}
	dnsText := "A_B_SERVICE_HOST=fd00::1\nA_B_SERVICE_PORT=53\nA_B_PORT=udp://[fd00::1]:53\nA_B_PORT_53_UDP=udp://[fd00::1]:53\n" +
		"A_B_PORT_53_UDP_PROTO=udp\nA_B_PORT_53_UDP_PORT=53\nA_B_PORT_53_UDP_ADDR=fd00::1\n"
	headless := edge.Service{Name: "db", ClusterIP: "None", Ports: []edge.ServicePort{{Port: 1}}}
	tests := map[string]struct {
		held    map[string][]edge.Service
		links   *bool
		want    string
		unknown bool
	}{
		"links: all that have an address":   {held: map[string][]edge.Service{"shop": {headless, api, dns}}, want: dnsText + apiText},
		"no links: the API server alone":    {held: map[string][]edge.Service{"shop": {dns, api}}, links: new(false), want: apiText},
		"none at all":                       {held: map[string][]edge.Service{"shop": nil}},
		"unknown services are waited for":   {held: map[string][]edge.Service{"default": {api}}, unknown: true},
		"even by a pod that wants no links": {held: map[string][]edge.Service{"default": {api}}, links: new(false), unknown: true},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			pod := web()
			pod.Spec.EnableServiceLinks = tt.links
			env, err := resolver(&objects{services: tt.held}).Env(pod, &corev1.Container{}, nil)
			if got := errors.Is(err, edge.ErrUnknown); got != tt.unknown || text(env) != tt.want {
				t.Errorf("Env = %v,\n%s\nwant\n%s", err, text(env), tt.want)
			}
		})
	}
}

func TestServiceEnvironmentYieldsToTheContainer(t *testing.T) {
	o := &objects{services: map[string][]edge.Service{"shop": {{Name: "kubernetes", ClusterIP: "10.96.0.1", Ports: []edge.ServicePort{{Port: 443}}}}}}
	c := corev1.Container{Env: []corev1.EnvVar{{Name: "KUBERNETES_SERVICE_HOST", Value: "api:$(KUBERNETES_SERVICE_PORT)"}}}
	env, err := resolver(o).Env(web(), &c, nil)
	if err != nil || strings.Count(text(env), "KUBERNETES_SERVICE_HOST=") != 1 || !strings.Contains(text(env), "HOST=api:443\n") {
		t.Errorf("Env = %v\n%s", err, text(env))
	}
}

func TestField(t *testing.T) {
	pod := web()
	pod.Status.PodIPs = []corev1.PodIP{{IP: "10.0.0.9"}}
	tests := map[string]struct{ path, want, wantErr string }{
		"name":                    {"metadata.name", "web-1", ""},
		"namespace":               {"metadata.namespace", "shop", ""},
		"uid":                     {"metadata.uid", "u-1", ""},
		"all labels":              {"metadata.labels", "app=\"web\"\napp.kubernetes.io/tier=\"front \\\"1\\\"\"", ""},
		"all annotations":         {"metadata.annotations", `Example.com/Note="two\nlines"`, ""},
		"one label":               {"metadata.labels['app.kubernetes.io/tier']", `front "1"`, ""},
		"one annotation":          {"metadata.annotations['Example.com/Note']", "two\nlines", ""},
		"a label that is not set": {"metadata.labels['none']", "", ""},
		"node":                    {"spec.nodeName", "site-a", ""},
		"service account":         {"spec.serviceAccountName", "robot", ""},
		"host address":            {"status.hostIP", "192.0.2.7", ""},
		"host addresses":          {"status.hostIPs", "192.0.2.7,2001:db8::7", ""},
		"pod address":             {"status.podIP", "10.0.0.9", ""},
		"not a field":             {"spec.containers", "", "field label not supported: spec.containers"},
		"not a map":               {"metadata.name['a']", "", "field label does not support subscript: metadata.name['a']"},
		"not a key":               {"metadata.labels['a b']", "", "invalid key subscript"},
		"an empty key":            {"metadata.labels['']", "", "invalid key subscript"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			got, err := resolver(held()).Field(pod, tt.path)
			if got != tt.want || (err == nil) != (tt.wantErr == "") || err != nil && !strings.Contains(err.Error(), tt.wantErr) {
				t.Errorf("Field(%s) = %q, %v, want %q, %q", tt.path, got, err, tt.want, tt.wantErr)
			}
		})
	}
}

func TestResource(t *testing.T) {
	tests := map[string]struct{ container, resource, divisor, want string }{
		"a request":                             {"main", "requests.memory", "1Mi", "100"},
		"rounded up":                            {"main", "requests.cpu", "", "1"},
		"in thousandths":                        {"main", "requests.cpu", "1m", "250"},
		"a limit":                               {"main", "limits.cpu", "1", "2"},
		"huge pages":                            {"main", "limits.hugepages-2Mi", "1Mi", "4"},
		"no limit: what the node has":           {"setup", "limits.cpu", "1m", "3500"},
		"no limit of memory":                    {"main", "limits.memory", "1", "2147483648"},
		"no limit of storage":                   {"main", "limits.ephemeral-storage", "1Gi", "10"},
		"no request: nothing":                   {"setup", "requests.memory", "", "0"},
		"a divisor of less than a byte is one":  {"main", "requests.memory", "1m", "104857600"},
		"unknown resource":                      {"main", "limits.gpu", "", "unsupported container resource : limits.gpu"},
		"unknown kind":                          {"main", "uses.cpu", "", "unsupported container resource : uses.cpu"},
		"unknown container":                     {"none", "limits.cpu", "", "container none not found"},
		"a divisor that is negative is refused": {"main", "limits.cpu", "-1", "quantity 1250m divided by -1: must not be negative"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			s := &corev1.ResourceFieldSelector{ContainerName: tt.container, Resource: tt.resource}
			if tt.divisor != "" {
				s.Divisor = resource.MustParse(tt.divisor)
			}
			got, err := resolver(held()).Resource(web(), "main", s)
			if err != nil {
				got = err.Error()
			}
			if got != tt.want {
				t.Errorf("Resource = %q, want %q", got, tt.want)
			}
		})
	}
	t.Run("no limit: what the pod has", func(t *testing.T) {
		pod := web()
		pod.Spec.Resources = &corev1.ResourceRequirements{Limits: corev1.ResourceList{corev1.ResourceMemory: resource.MustParse("512Mi")}}
		got, err := resolver(held()).Resource(pod, "setup", &corev1.ResourceFieldSelector{Resource: "limits.memory", Divisor: resource.MustParse("1Mi")})
		if got != "512" || err != nil {
			t.Errorf("Resource = %q, %v, want 512", got, err)
		}
	})
}

func TestCommand(t *testing.T) {
	c := corev1.Container{Command: []string{"/bin/$(APP)", "$$(APP)"}, Args: []string{"--x=$(NONE)", "$(APP)$"}}
	command, args := resolver(held()).Command(&c, []*cri.KeyValue{{Key: "APP", Value: []byte("web")}})
	if want := []string{"/bin/web", "$(APP)"}; !reflect.DeepEqual(command, want) {
		t.Errorf("command = %q, want %q", command, want)
	}
	if want := []string{"--x=$(NONE)", "web$"}; !reflect.DeepEqual(args, want) {
		t.Errorf("args = %q, want %q", args, want)
	}
}

func TestFileKeyRef(t *testing.T) {
	dir := t.TempDir()
	content := "# comment\n\n  A='one # not a comment' # comment\nB='two\nlines'\nEMPTY=''\nSPACE= 'x'\n"
	if err := os.WriteFile(filepath.Join(dir, "env"), []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	tests := map[string]struct {
		path, key string
		optional  bool
		want      string
		wantErr   bool
	}{
		"a value":                 {path: "env", key: "A", want: "V=one # not a comment\n"},
		"a value of two lines":    {path: "env", key: "B", want: "V=two\nlines\n"},
		"empty counts as missing": {path: "env", key: "EMPTY", wantErr: true},
		"space makes it empty":    {path: "env", key: "SPACE", wantErr: true},
		"a missing key":           {path: "env", key: "C", wantErr: true},
		"an optional key":         {path: "env", key: "C", optional: true},
		"a missing file":          {path: "none", key: "A", wantErr: true},
		"an optional file":        {path: "none", key: "A", optional: true},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			r := resolver(held())
			r.config.ReadVolumeFile = func(_ *corev1.Pod, volume, path string) (io.ReadCloser, error) {
				if volume != "cfg" {
					return nil, fs.ErrInvalid
				}
				return os.Open(filepath.Join(dir, path))
			}
			c := corev1.Container{Env: []corev1.EnvVar{{Name: "V", ValueFrom: &corev1.EnvVarSource{
				FileKeyRef: &corev1.FileKeySelector{VolumeName: "cfg", Path: tt.path, Key: tt.key, Optional: &tt.optional}}}}}
			env, err := r.Env(web(), &c, nil)
			if (err != nil) != tt.wantErr || text(env) != tt.want {
				t.Errorf("Env = %q, %v, want %q", text(env), err, tt.want)
			}
		})
	}
}

func TestReadEnvFileRefuses(t *testing.T) {
	for _, bad := range []string{"A", "='x'", "A ='x'", "A=x", "A=\"x\"", "A='x''y'", "A='x", "A='x'y"} {
		if v, ok, err := readEnvFile(strings.NewReader("OK='1'\n"+bad), "Z"); err == nil || !strings.Contains(err.Error(), "line 2: ") {
			t.Errorf("%q: got %q, %v, %v, want an error in line 2", bad, v, ok, err)
		}
	}
}
