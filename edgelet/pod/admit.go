package pod

import corev1 "k8s.io/api/core/v1"

// refuses says why the site cannot run a new pod; empty: it can.
func (m *Manager) refuses(pod *corev1.Pod) (reason, message string) { return "", "" }
