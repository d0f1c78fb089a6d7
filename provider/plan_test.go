package provider

import (
	"context"
	"encoding/json"
	"errors"
	"reflect"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/skerry-io/skerry/api/edge"
)

func TestReferences(t *testing.T) {
	local := func(name string) corev1.LocalObjectReference { return corev1.LocalObjectReference{Name: name} }
	secretEnv := func(name string) corev1.EnvVar {
		return corev1.EnvVar{Name: "X", ValueFrom: &corev1.EnvVarSource{SecretKeyRef: &corev1.SecretKeySelector{LocalObjectReference: local(name)}}}
	}
	tests := map[string]struct {
		spec corev1.PodSpec
		want references
	}{
		"none": {corev1.PodSpec{}, references{}},
		"environment of all kinds of containers": {
			corev1.PodSpec{
				InitContainers: []corev1.Container{{Env: []corev1.EnvVar{secretEnv("init")}}},
				Containers: []corev1.Container{{
					EnvFrom: []corev1.EnvFromSource{{SecretRef: &corev1.SecretEnvSource{LocalObjectReference: local("from")}}, {ConfigMapRef: &corev1.ConfigMapEnvSource{LocalObjectReference: local("cm-from")}}},
					Env:     []corev1.EnvVar{{Name: "Y", ValueFrom: &corev1.EnvVarSource{ConfigMapKeyRef: &corev1.ConfigMapKeySelector{LocalObjectReference: local("cm")}}}, {Name: "Z", Value: "plain"}},
				}},
				EphemeralContainers: []corev1.EphemeralContainer{{EphemeralContainerCommon: corev1.EphemeralContainerCommon{Env: []corev1.EnvVar{secretEnv("debug")}}}},
			},
			references{secrets: []string{"debug", "from", "init"}, configMaps: []string{"cm", "cm-from"}},
		},
		"volumes, projected ones and pull secrets, each once": {
			corev1.PodSpec{
				ServiceAccountName: "robot", ImagePullSecrets: []corev1.LocalObjectReference{local("pull"), local("")}, RuntimeClassName: new("gvisor"),
				Volumes: []corev1.Volume{
					{VolumeSource: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "pull"}}},
					{VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{LocalObjectReference: local("cm")}}},
					{VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{Sources: []corev1.VolumeProjection{
						{Secret: &corev1.SecretProjection{LocalObjectReference: local("p")}}, {ConfigMap: &corev1.ConfigMapProjection{LocalObjectReference: local("cm")}},
						{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{Audience: "vault", ExpirationSeconds: new(int64(600))}},
						{ServiceAccountToken: &corev1.ServiceAccountTokenProjection{}}, {ServiceAccountToken: &corev1.ServiceAccountTokenProjection{}},
					}}}},
				},
			},
			references{secrets: []string{"p", "pull"}, configMaps: []string{"cm"}, tokens: []tokenRef{{"robot", "", 3600}, {"robot", "vault", 600}}, class: "gvisor"},
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			if got := referencesOf(&corev1.Pod{Spec: tt.spec}); !reflect.DeepEqual(got, tt.want) {
				t.Errorf("references = %+v, want %+v", got, tt.want)
			}
		})
	}
}

func FuzzReferences(f *testing.F) {
	f.Add([]byte(`{"containers":[{"envFrom":[{"secretRef":{"name":"a"}}]}],"volumes":[{"projected":{"sources":[{"serviceAccountToken":{}}]}}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var pod corev1.Pod
		if json.Unmarshal(data, &pod.Spec) != nil {
			return
		}
		r := referencesOf(&pod)
		for _, names := range [][]string{r.secrets, r.configMaps} {
			if !slices.IsSorted(names) || slices.Contains(names, "") || len(slices.Compact(slices.Clone(names))) != len(names) {
				t.Errorf("names = %q", names)
			}
		}
	})
}

func TestDiff(t *testing.T) {
	a, b, c := edge.Key{Kind: "A"}, edge.Key{Kind: "B"}, edge.Key{Kind: "C"}
	p := newPlan()
	p.add(b, candidate{version: "1"})
	p.add(a, candidate{version: "2"})
	p.keep[c] = true
	tests := map[string]struct {
		held              map[edge.Key]string
		upserts, removals []edge.Key
	}{
		"an empty site gets all, in the plan's order":         {nil, []edge.Key{b, a}, nil},
		"what it holds at the same version is not sent":       {map[edge.Key]string{a: "2", b: "0"}, []edge.Key{b}, nil},
		"what could not be read is neither sent nor removed":  {map[edge.Key]string{a: "2", b: "1", c: "9"}, nil, nil},
		"what is not wanted is removed, in the order of keys": {map[edge.Key]string{a: "2", b: "1", {Kind: "Z"}: "1", {Kind: "Y"}: "1"}, nil, []edge.Key{{Kind: "Y"}, {Kind: "Z"}}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			if upserts, removals := p.diff(tt.held); !slices.Equal(upserts, tt.upserts) || !slices.Equal(removals, tt.removals) {
				t.Errorf("diff = %v, %v", upserts, removals)
			}
		})
	}
}

func TestServicesForEdge(t *testing.T) {
	service := func(namespace, name, ip string) *corev1.Service {
		return &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}, Spec: corev1.ServiceSpec{ClusterIP: ip}}
	}
	got := servicesForEdge([]*corev1.Service{service("a", "web", "10.0.0.2"), service("a", "headless", "None"), service("a", "external", ""), service("default", "kubernetes", "10.0.0.1")})
	if len(got) != 2 || got[0].Name != "kubernetes" || got[1].Name != "web" {
		t.Errorf("services = %v", got)
	}
}

func TestRenewal(t *testing.T) {
	for name, tt := range map[string]struct{ life, want time.Duration }{
		"80% of an hour":         {time.Hour, 48 * time.Minute},
		"a day of a year's life": {365 * 24 * time.Hour, 24 * time.Hour},
	} {
		t.Run(name, func(t *testing.T) {
			if got := renewalOf(t0.Time, t0.Add(tt.life)).Sub(t0.Time); got != tt.want {
				t.Errorf("renewal after %v, want %v", got, tt.want)
			}
		})
	}
}

func TestLiftTolerations(t *testing.T) {
	toleration := func(key string, seconds *int64) corev1.Toleration {
		return corev1.Toleration{Key: key, Operator: corev1.TolerationOpExists, Effect: corev1.TaintEffectNoExecute, TolerationSeconds: seconds}
	}
	pod := func(mark string, tolerations ...corev1.Toleration) *corev1.Pod {
		p := &corev1.Pod{Spec: corev1.PodSpec{Tolerations: tolerations}}
		if mark != "" {
			p.Annotations = map[string]string{annotationLifted: mark}
		}
		return p
	}
	ready, other := corev1.TaintNodeNotReady, "example.com/other"
	tests := map[string]struct {
		pod      *corev1.Pod
		autonomy *int64
		want     []*int64 // seconds, nil if nothing changes
	}{
		"the default is lifted for ever":                 {pod("", toleration(ready, new(int64(300)))), nil, []*int64{nil}},
		"or for as long as the node says":                {pod("", toleration(ready, new(int64(300)))), new(int64(3600)), []*int64{new(int64(3600))}},
		"what a person has chosen stays":                 {pod("", toleration(ready, new(int64(30)))), nil, nil},
		"other taints' tolerations stay":                 {pod("", toleration(other, new(int64(300)))), nil, nil},
		"once lifted there is nothing to do":             {pod("forever", toleration(ready, nil)), nil, nil},
		"a node that changes its mind changes its pods'": {pod("forever", toleration(ready, nil)), new(int64(60)), []*int64{new(int64(60))}},
		"back to for ever":                               {pod("60s", toleration(ready, new(int64(60)))), nil, []*int64{nil}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			got, _, ok := liftTolerations(tt.pod, tt.autonomy)
			if ok != (tt.want != nil) {
				t.Fatalf("changed = %v, %v", ok, got)
			}
			for i, want := range tt.want {
				if !reflect.DeepEqual(got[i].TolerationSeconds, want) {
					t.Errorf("seconds = %v, want %v", got[i].TolerationSeconds, want)
				}
			}
		})
	}
}

func TestAskedLabels(t *testing.T) {
	got := askedLabels(map[string]string{
		"rack": "7", "example.com/line": "a", "topology.kubernetes.io/zone": "north", "kubernetes.io/hostname": "x", "node-role.kubernetes.io/control-plane": "",
		"node-restriction.kubernetes.io/a": "b", "skerry.io/site": "other", "type": "big", "bad key": "v", "bad": "a b",
	})
	if want := map[string]string{"rack": "7", "example.com/line": "a", "topology.kubernetes.io/zone": "north"}; !reflect.DeepEqual(got, want) {
		t.Errorf("labels = %v, want %v", got, want)
	}
}

func TestNodeStatus(t *testing.T) {
	at := endpoint{"10.0.0.1", "1", 20000, t0.Time}
	node := newNode("a", false)
	if s := nodeStatus(node, nil, at, t0.Time); nodeCondition(s.Conditions, corev1.NodeReady) != nil {
		t.Error("Ready before the site has said what it has")
	}
	node.Status = nodeStatus(node, fakeNode(), at, t0.Time)
	tests := map[string]struct {
		was, said, want corev1.ConditionStatus
	}{
		"what the site says counts":                    {corev1.ConditionTrue, corev1.ConditionFalse, corev1.ConditionFalse},
		"what it said before stays":                    {corev1.ConditionFalse, "", corev1.ConditionFalse},
		"unknown is over as soon as it is connected":   {corev1.ConditionUnknown, "", corev1.ConditionTrue},
		"a status that does not exist is not believed": {corev1.ConditionTrue, "Perhaps", corev1.ConditionTrue},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			node := node.DeepCopy()
			nodeCondition(node.Status.Conditions, corev1.NodeReady).Status = tt.was
			said := fakeNode()
			said.Conditions[0].Status = tt.said
			if tt.said == "" {
				said = nil
			}
			if got := nodeCondition(nodeStatus(node, said, at, t0.Time).Conditions, corev1.NodeReady).Status; got != tt.want {
				t.Errorf("Ready = %s, want %s", got, tt.want)
			}
		})
	}
}

func TestWheelRenewsEveryTenSecondsAndRetriesWithinOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		var mu sync.Mutex
		var renewed []time.Time
		fail := 0
		var departed int
		w := newWheel(func(context.Context, string) error {
			mu.Lock()
			defer mu.Unlock()
			renewed = append(renewed, time.Now())
			if fail > 0 {
				fail--
				return errors.New("refused")
			}
			return nil
		}, func(context.Context, string) error { mu.Lock(); defer mu.Unlock(); departed++; return nil })
		ended := make(chan error)
		go func() { ended <- w.run(ctx) }()
		begun := time.Now()
		w.join("a")
		pass := func(d time.Duration) {
			mu.Unlock()
			time.Sleep(d)
			synctest.Wait()
			mu.Lock()
		}
		mu.Lock()
		pass(60*time.Second + time.Millisecond)
		if len(renewed) != 7 || renewed[0].Sub(begun) != 0 {
			t.Errorf("renewed %d times in a minute, first after %v", len(renewed), renewed[0].Sub(begun))
		}
		fail, renewed = 3, nil
		pass(14 * time.Second)
		if len(renewed) != 4 {
			t.Errorf("%d tries with three failures, want 4", len(renewed))
		}
		renewed = nil
		w.leave("a")
		pass(3 * time.Second)
		if departed != 1 {
			t.Errorf("departed %d times", departed)
		}
		w.join("b")
		w.leave("b")
		w.join("b")
		pass(5 * time.Second)
		if departed != 1 {
			t.Error("departed was called for a site that is back")
		}
		mu.Unlock()
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}
