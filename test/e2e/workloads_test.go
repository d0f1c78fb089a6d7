//go:build e2e

package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

func TestDeployment(t *testing.T) {
	ns := namespace(t)
	apply(t, ns, `
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 3
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      nodeSelector: {skerry.io/site: $SITE}
      terminationGracePeriodSeconds: 2
      containers:
        - {name: main, image: $IMAGE, command: [sleep, "3600"], env: [{name: RELEASE, value: one}]}
`)
	kubectl(t, "-n", ns, "rollout", "status", "deployment/web", "--timeout=60s")
	kubectl(t, "-n", ns, "set", "env", "deployment/web", "RELEASE=two")
	kubectl(t, "-n", ns, "rollout", "status", "deployment/web", "--timeout=90s")
	if out := kubectl(t, "-n", ns, "exec", "deployment/web", "--", "sh", "-c", "echo $RELEASE"); out != "two\n" {
		t.Errorf("after the rollout: %q", out)
	}
	kubectl(t, "-n", ns, "scale", "deployment/web", "--replicas=0")
	until(t, time.Minute, "all pods are gone", func() error {
		if out := kubectl(t, "-n", ns, "get", "pods", "-o", "name"); out != "" {
			return fmt.Errorf("left: %s", out)
		}
		return nil
	})
}

func TestStatefulSet(t *testing.T) {
	ns := namespace(t)
	apply(t, ns, `
apiVersion: v1
kind: Service
metadata: {name: db}
spec: {clusterIP: None, selector: {app: db}}
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: db}
spec:
  serviceName: db
  replicas: 2
  selector: {matchLabels: {app: db}}
  template:
    metadata: {labels: {app: db}}
    spec:
      nodeSelector: {skerry.io/site: $SITE}
      terminationGracePeriodSeconds: 2
      containers:
        - {name: main, image: $IMAGE, command: [sleep, "3600"]}
`)
	kubectl(t, "-n", ns, "rollout", "status", "statefulset/db", "--timeout=60s")
	if out := kubectl(t, "-n", ns, "exec", "db-1", "--", "hostname", "-f"); !strings.HasPrefix(out, "db-1.db."+ns+".svc.cluster.local") {
		t.Errorf("hostname -f: %q", out)
	}
	before := jsonpath(t, ns, "pod/db-0", ".metadata.uid")
	kubectl(t, "-n", ns, "delete", "pod", "db-0", "--wait=false")
	until(t, time.Minute, "db-0 is another pod and ready", func() error {
		out, err := shared.Kubectl(t.Context(), "-n", ns, "get", "pod", "db-0", "-o", "jsonpath={.metadata.uid} {.status.containerStatuses[0].ready}")
		if err == nil && (strings.HasPrefix(out, before) || !strings.HasSuffix(out, " true")) {
			err = fmt.Errorf("it is %s, was %s", out, before)
		}
		return err
	})
}

func TestDaemonSet(t *testing.T) {
	ns := namespace(t)
	apply(t, ns, `
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: agent}
spec:
  selector: {matchLabels: {app: agent}}
  template:
    metadata: {labels: {app: agent}}
    spec:
      hostNetwork: true
      terminationGracePeriodSeconds: 2
      containers:
        - {name: main, image: $IMAGE, command: [sleep, "3600"]}
`)
	kubectl(t, "-n", ns, "rollout", "status", "daemonset/agent", "--timeout=60s")
	pod := strings.TrimSpace(kubectl(t, "-n", ns, "get", "pods", "-o", "name"))
	if host, ip := jsonpath(t, ns, pod, ".status.hostIP"), jsonpath(t, ns, pod, ".status.podIP"); host != ip || ip == "" {
		t.Errorf("a pod in the host's network has IP %q on host %q", ip, host)
	}
}

func TestJobs(t *testing.T) {
	ns := namespace(t)
	apply(t, ns, `
apiVersion: batch/v1
kind: Job
metadata: {name: sum}
spec:
  completions: 3
  parallelism: 2
  template:
    spec:
      nodeSelector: {skerry.io/site: $SITE}
      restartPolicy: Never
      containers:
        - {name: main, image: $IMAGE, command: [sh, -c, 'echo $((1+1))']}
---
apiVersion: batch/v1
kind: Job
metadata: {name: fails}
spec:
  backoffLimit: 0
  template:
    spec:
      nodeSelector: {skerry.io/site: $SITE}
      restartPolicy: Never
      containers:
        - {name: main, image: $IMAGE, command: [sh, -c, 'echo broken > /dev/termination-log; exit 7']}
---
apiVersion: batch/v1
kind: CronJob
metadata: {name: tick}
spec:
  schedule: "* * * * *"
  jobTemplate:
    spec:
      template:
        spec:
          nodeSelector: {skerry.io/site: $SITE}
          restartPolicy: OnFailure
          containers:
            - {name: main, image: $IMAGE, command: [date]}
`)
	kubectl(t, "-n", ns, "wait", "--for=condition=Complete", "--timeout=60s", "job/sum")
	kubectl(t, "-n", ns, "wait", "--for=condition=Failed", "--timeout=60s", "job/fails")
	ended := kubectl(t, "-n", ns, "get", "pods", "-l", "job-name=fails", "-o",
		"jsonpath={.items[0].status.phase} {.items[0].status.containerStatuses[0].state.terminated.exitCode} {.items[0].status.containerStatuses[0].state.terminated.reason} {.items[0].status.containerStatuses[0].state.terminated.message}")
	if strings.TrimSpace(ended) != "Failed 7 Error broken" {
		t.Errorf("the failed pod says %q", ended)
	}
	until(t, 90*time.Second, "the CronJob has run", func() error {
		if out := jsonpath(t, ns, "cronjob/tick", ".status.lastSuccessfulTime"); out == "" {
			return fmt.Errorf("not yet")
		}
		return nil
	})
}

func TestInitContainersAndSidecars(t *testing.T) {
	ns := namespace(t)
	apply(t, ns, `
apiVersion: v1
kind: Pod
metadata: {name: staged}
spec:
  nodeSelector: {skerry.io/site: $SITE}
  restartPolicy: Never
  terminationGracePeriodSeconds: 2
  volumes: [{name: work, emptyDir: {}}]
  initContainers:
    - {name: first, image: $IMAGE, command: [sh, -c, 'echo first >> /work/order'], volumeMounts: [{name: work, mountPath: /work}]}
    - name: sidecar
      image: $IMAGE
      restartPolicy: Always
      command: [sh, -c, 'echo sidecar >> /work/order; trap exit TERM; touch /work/up; sleep 3600 & wait $!']
      startupProbe: {exec: {command: [test, -e, /work/up]}, periodSeconds: 1}
      volumeMounts: [{name: work, mountPath: /work}]
    - {name: last, image: $IMAGE, command: [sh, -c, 'echo last >> /work/order'], volumeMounts: [{name: work, mountPath: /work}]}
  containers:
    - {name: main, image: $IMAGE, command: [cat, /work/order], volumeMounts: [{name: work, mountPath: /work}]}
`)
	awaitPath(t, ns, "pod/staged", ".status.phase", "Succeeded")
	if out := kubectl(t, "-n", ns, "logs", "staged", "-c", "main"); out != "first\nsidecar\nlast\n" {
		t.Errorf("they ran in the order %q", out)
	}
}

func TestProbes(t *testing.T) {
	ns := namespace(t)
	apply(t, ns, `
apiVersion: v1
kind: Pod
metadata: {name: probed}
spec:
  nodeSelector: {skerry.io/site: $SITE}
  terminationGracePeriodSeconds: 1
  containers:
    - name: ready
      image: $IMAGE
      command: [sh, -c, 'mkdir /www; exec httpd -f -p 8080 -h /www']
      readinessProbe: {httpGet: {path: /ok, port: 8080}, periodSeconds: 1}
    - name: alive
      image: $IMAGE
      command: [sh, -c, 'touch /alive; sleep 3600']
      livenessProbe: {exec: {command: [cat, /alive]}, periodSeconds: 1, failureThreshold: 2}
    - name: open
      image: $IMAGE
      command: [sh, -c, 'sleep 2; exec httpd -f -p 9000']
      startupProbe: {tcpSocket: {port: 9000}, periodSeconds: 1}
`)
	awaitPath(t, ns, "pod/probed", `.status.containerStatuses[?(@.name=="open")].started`, "true")
	if ready := jsonpath(t, ns, "pod/probed", `.status.containerStatuses[?(@.name=="ready")].ready`); ready != "false" {
		t.Errorf("ready before its probe succeeded: %q", ready)
	}
	kubectl(t, "-n", ns, "exec", "probed", "-c", "ready", "--", "touch", "/www/ok")
	kubectl(t, "-n", ns, "wait", "--for=condition=Ready", "--timeout=30s", "pod/probed")
	kubectl(t, "-n", ns, "exec", "probed", "-c", "alive", "--", "rm", "/alive")
	awaitPath(t, ns, "pod/probed", `.status.containerStatuses[?(@.name=="alive")].restartCount`, "1")
	until(t, 15*time.Second, "the events say why", func() error {
		out := kubectl(t, "-n", ns, "get", "events", "-o", "jsonpath={range .items[*]}{.reason}: {.message}{\"\\n\"}{end}")
		for _, part := range []string{"Unhealthy: Readiness probe failed: HTTP probe failed with statuscode: 404", "Unhealthy: Liveness probe failed", "Killing: Container alive failed liveness probe, will be restarted"} {
			if !strings.Contains(out, part) {
				return fmt.Errorf("no %q in:\n%s", part, out)
			}
		}
		return nil
	})
}

func TestEnvironmentAndVolumes(t *testing.T) {
	ns := namespace(t)
	apply(t, ns, `
apiVersion: v1
kind: ConfigMap
metadata: {name: settings}
data: {color: blue, shape: round}
---
apiVersion: v1
kind: Secret
metadata: {name: keys}
stringData: {password: hunter2}
---
apiVersion: v1
kind: Pod
metadata: {name: rich, labels: {tier: gold}, annotations: {note: "n1"}}
spec:
  nodeSelector: {skerry.io/site: $SITE}
  terminationGracePeriodSeconds: 1
  hostname: box
  hostAliases: [{ip: 10.1.2.3, hostnames: [printer.local]}]
  dnsConfig: {options: [{name: timeout, value: "1"}]}
  securityContext: {fsGroup: 4321}
  volumes:
    - {name: disk, emptyDir: {}}
    - {name: ram, emptyDir: {medium: Memory, sizeLimit: 8Mi}}
    - {name: settings, configMap: {name: settings}}
    - {name: keys, secret: {secretName: keys, defaultMode: 0400}}
    - {name: info, downwardAPI: {items: [{path: labels, fieldRef: {fieldPath: metadata.labels}}]}}
    - name: all
      projected:
        sources:
          - configMap: {name: settings, items: [{key: color, path: deep/color}]}
          - secret: {name: keys}
          - serviceAccountToken: {path: token, audience: vault, expirationSeconds: 600}
    - {name: host, hostPath: {path: /tmp, type: Directory}}
  containers:
    - name: main
      image: $IMAGE
      command: [sleep, "3600"]
      resources: {requests: {cpu: 50m, memory: 16Mi}, limits: {cpu: 200m, memory: 32Mi}}
      envFrom: [{configMapRef: {name: settings}, prefix: CFG_}, {configMapRef: {name: missing, optional: true}}]
      env:
        - {name: PASSWORD, valueFrom: {secretKeyRef: {name: keys, key: password}}}
        - {name: POD, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
        - {name: IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
        - {name: LIMIT, valueFrom: {resourceFieldRef: {resource: limits.memory, divisor: 1Mi}}}
        - {name: BOTH, value: "$(POD)-$(CFG_color)"}
      volumeMounts:
        - {name: disk, mountPath: /disk}
        - {name: ram, mountPath: /ram}
        - {name: settings, mountPath: /settings}
        - {name: keys, mountPath: /keys}
        - {name: info, mountPath: /info}
        - {name: all, mountPath: /all}
        - {name: disk, mountPath: /sub, subPath: a/b}
        - {name: host, mountPath: /host}
`)
	kubectl(t, "-n", ns, "wait", "--for=condition=Ready", "--timeout=60s", "pod/rich")
	sh := func(script string) string {
		return strings.TrimSpace(kubectl(t, "-n", ns, "exec", "rich", "--", "sh", "-c", script))
	}
	ip := jsonpath(t, ns, "pod/rich", ".status.podIP")
	for script, want := range map[string]string{
		"echo $CFG_color $CFG_shape $PASSWORD $POD $IP $LIMIT $BOTH": "blue round hunter2 rich " + ip + " 32 rich-blue",
		"hostname":                             "box",
		"grep -c printer.local /etc/hosts":     "1",
		"grep -o 'timeout:1' /etc/resolv.conf": "timeout:1",
		"cat /settings/color /all/deep/color /keys/password /all/password": "bluebluehunter2hunter2",
		"cat /info/labels":                   `tier="gold"`,
		"stat -c %a /keys/..data/password":   "440", // 0400, and read for the group of fsGroup
		"stat -c %g /disk":                   "4321",
		"df -k /ram | awk 'NR==2{print $2}'": "8192",
		"touch /sub/x && ls /disk/a/b":       "x",
		"cut -d. -f2 /all/token | grep -c .": "1",
		"test -e /var/run/secrets/kubernetes.io/serviceaccount/token && cat /var/run/secrets/kubernetes.io/serviceaccount/namespace": ns,
		"cat /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null || cat /sys/fs/cgroup/memory.max":                               "33554432",
	} {
		t.Run(script, func(t *testing.T) {
			if got := sh(script); got != want {
				t.Errorf("%q, want %q", got, want)
			}
		})
	}
	t.Run("a changed ConfigMap reaches the running pod", func(t *testing.T) {
		kubectl(t, "-n", ns, "patch", "configmap", "settings", "-p", `{"data":{"color":"red"}}`)
		until(t, 30*time.Second, "the file is red", func() error {
			if got := sh("cat /settings/color /all/deep/color"); got != "redred" {
				return fmt.Errorf("it is %q", got)
			}
			return nil
		})
	})
}

func TestMissingConfigMap(t *testing.T) {
	ns := namespace(t)
	apply(t, ns, strings.Replace(sleeper, "image: $IMAGE", "image: $IMAGE\n      env: [{name: X, valueFrom: {configMapKeyRef: {name: late, key: x}}}]", 1))
	awaitPath(t, ns, "pod/sleeper", ".status.containerStatuses[0].state.waiting.reason", "CreateContainerConfigError")
	kubectl(t, "-n", ns, "create", "configmap", "late", "--from-literal=x=1")
	kubectl(t, "-n", ns, "wait", "--for=condition=Ready", "--timeout=30s", "pod/sleeper")
}

func TestImageThatDoesNotExist(t *testing.T) {
	ns := namespace(t)
	apply(t, ns, `
apiVersion: v1
kind: Pod
metadata: {name: nothing}
spec:
  nodeSelector: {skerry.io/site: $SITE}
  containers:
    - {name: never, image: "skerry.test/none:1", imagePullPolicy: Never}
    - {name: invalid, image: "Not:A/Name"}
`)
	awaitPath(t, ns, "pod/nothing", `.status.containerStatuses[?(@.name=="never")].state.waiting.reason`, "ErrImageNeverPull")
	awaitPath(t, ns, "pod/nothing", `.status.containerStatuses[?(@.name=="invalid")].state.waiting.reason`, "InvalidImageName")
}

func TestCrashLoop(t *testing.T) {
	ns := namespace(t)
	apply(t, ns, `
apiVersion: v1
kind: Pod
metadata: {name: crasher}
spec:
  nodeSelector: {skerry.io/site: $SITE}
  containers:
    - {name: main, image: $IMAGE, command: [sh, -c, 'exit 5']}
`)
	awaitPath(t, ns, "pod/crasher", ".status.containerStatuses[0].state.waiting.reason", "CrashLoopBackOff")
	awaitPath(t, ns, "pod/crasher", ".status.containerStatuses[0].lastState.terminated.exitCode", "5")
}
