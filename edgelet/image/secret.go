package image

import (
	"cmp"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/distribution/reference"
	corev1 "k8s.io/api/core/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// login is one entry of a Docker configuration.
type login struct {
	Username string `json:"username"`
	Password string `json:"password"`
	Auth     string `json:"auth"` // base64 of username:password
	Identity string `json:"identitytoken"`
	Registry string `json:"registrytoken"`
}

// candidate is a login for registries that a pattern matches.
type candidate struct {
	host, path string
	auth       *cri.AuthConfig
}

// credentials returns those of the secrets that are for image, the most specific
// first, together with what is wrong with any secret.
func credentials(secrets []*corev1.Secret, image string) ([]*cri.AuthConfig, error) {
	named, err := reference.ParseNormalizedNamed(image)
	if err != nil {
		return nil, err
	}
	var found []candidate
	var errs []error
	for _, secret := range secrets {
		logins, err := parseSecret(secret)
		if err != nil {
			errs = append(errs, fmt.Errorf("secret %s/%s: %w", secret.Namespace, secret.Name, err))
		}
		for pattern, login := range logins {
			auth, err := login.config()
			if err != nil {
				errs = append(errs, fmt.Errorf("secret %s/%s: registry %q: %w", secret.Namespace, secret.Name, clean(pattern), err))
				continue
			}
			c := candidate{auth: auth}
			if c.host, c.path = splitPattern(pattern); c.matches(reference.Domain(named), reference.Path(named)) {
				found = append(found, c)
			}
		}
	}
	// The longest path first; of equal ones an order that does not change.
	slices.SortStableFunc(found, func(a, b candidate) int {
		return cmp.Or(cmp.Compare(len(b.path), len(a.path)), cmp.Compare(len(b.host), len(a.host)),
			cmp.Compare(b.host, a.host), cmp.Compare(a.auth.Username, b.auth.Username), cmp.Compare(a.auth.Password, b.auth.Password))
	})
	auths := make([]*cri.AuthConfig, 0, len(found))
	for _, c := range found {
		auths = append(auths, c.auth)
	}
	return auths, errors.Join(errs...)
}

// parseSecret reads the logins of a pull secret, by registry.
func parseSecret(secret *corev1.Secret) (map[string]login, error) {
	if data, ok := secret.Data[corev1.DockerConfigJsonKey]; ok {
		var config struct {
			Auths map[string]login `json:"auths"`
		}
		err := json.Unmarshal(data, &config)
		return config.Auths, parseError(err)
	}
	if data, ok := secret.Data[corev1.DockerConfigKey]; ok {
		var logins map[string]login
		err := json.Unmarshal(data, &logins)
		return logins, parseError(err)
	}
	return nil, errors.New("neither .dockerconfigjson nor .dockercfg in it")
}

// parseError hides what json quotes of its input, which is secret.
func parseError(err error) error {
	if err == nil {
		return nil
	}
	return errors.New("not a Docker configuration")
}

// config makes CRI's form of a login.
func (l login) config() (*cri.AuthConfig, error) {
	if l.Auth != "" && (l.Username == "" || l.Password == "") {
		// Some tools leave the padding out, some pad with zero bytes inside.
		data, err := base64.RawStdEncoding.DecodeString(strings.TrimRight(strings.TrimSpace(l.Auth), "="))
		if err != nil {
			return nil, errors.New("auth is not base64")
		}
		user, password, ok := strings.Cut(strings.TrimRight(string(data), "\x00"), ":")
		if !ok {
			return nil, errors.New("auth is not username:password")
		}
		l.Username, l.Password = user, password
	}
	return &cri.AuthConfig{Username: l.Username, Password: l.Password, IdentityToken: l.Identity, RegistryToken: l.Registry}, nil
}

// splitPattern reads the key of a login: a registry with or without scheme, port
// and path. Docker Hub has had several names.
func splitPattern(pattern string) (host, dir string) {
	pattern = strings.TrimPrefix(strings.TrimPrefix(pattern, "https://"), "http://")
	host, dir, _ = strings.Cut(pattern, "/")
	dir = strings.Trim(dir, "/")
	if dir == "v1" || dir == "v2" {
		dir = ""
	}
	if host == "index.docker.io" || host == "registry-1.docker.io" {
		host = "docker.io"
	}
	return host, dir
}

// matches reports whether a login is for a repository: its host label by label,
// where a label may have wildcards, and its path as whole leading components.
func (c candidate) matches(domain, repository string) bool {
	if c.path != "" && c.path != repository && !strings.HasPrefix(repository, c.path+"/") {
		return false
	}
	host, port, _ := strings.Cut(c.host, ":")
	domain, domainPort, _ := strings.Cut(domain, ":")
	want, have := strings.Split(host, "."), strings.Split(domain, ".")
	if port != domainPort || len(want) != len(have) {
		return false
	}
	for i := range want {
		if ok, err := path.Match(want[i], have[i]); err != nil || !ok {
			return false
		}
	}
	return true
}

// fingerprint distinguishes sets of credentials without revealing them.
func fingerprint(auths []*cri.AuthConfig) string {
	if len(auths) == 0 {
		return ""
	}
	hash := sha256.New()
	for _, a := range auths {
		fmt.Fprintf(hash, "%q %q %q %q\n", a.Username, a.Password, a.IdentityToken, a.RegistryToken)
	}
	return hex.EncodeToString(hash.Sum(nil)[:8])
}
