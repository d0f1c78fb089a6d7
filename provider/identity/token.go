package identity

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"

	"github.com/skerry-io/skerry/internal/backoff"
	"github.com/skerry-io/skerry/tunnel/bootstrap"
)

// How a token is kept. The first three keys, the name's prefix and the type are
// those of Kubernetes' bootstrap tokens.
const (
	tokenType   corev1.SecretType = "bootstrap.kubernetes.io/token"
	tokenPrefix                   = "bootstrap-token-"
	tokenLabel                    = "skerry.io/join-token"

	keyID          = "token-id"
	keyExpiration  = "expiration" // RFC 3339
	keyDescription = "description"
	keyUsage       = "usage-skerry-join" // "true"
	keyHash        = "token-sha256"      // hex SHA-256 of the secret part
	keySite        = "site"
	keyReplace     = "replace"     // "true"
	keyReusable    = "reusable"    // "true"
	keyRedeemed    = "redeemed-by" // nobody, or a redemption
)

const (
	nobody       = "nobody"
	defaultTTL   = 24 * time.Hour
	maxTTL       = 366 * 24 * time.Hour
	keepExpired  = 24 * time.Hour // so that late users are told that it has expired
	collectEvery = time.Hour
)

// TokenOptions say what a join token allows. The zero value: one machine, under
// any name that is free, within 24 hours.
type TokenOptions struct {
	Site        string        // the only site that may join with it
	Replace     bool          // Site may have a certificate, which is then good no more
	Reusable    bool          // many machines may join with it, each under a free name
	TTL         time.Duration // default 24 h; at most a year
	Description string        // for people
}

// check reports all that is wrong.
func (o TokenOptions) check() error {
	var errs []error
	if o.Site != "" {
		errs = append(errs, bootstrap.ValidateSite(o.Site))
	}
	if o.Replace && o.Site == "" {
		errs = append(errs, errors.New("replace: needs a site"))
	}
	if o.Reusable && o.Site != "" {
		errs = append(errs, errors.New("reusable: cannot be for one site"))
	}
	if o.TTL < 0 || o.TTL > maxTTL {
		errs = append(errs, fmt.Errorf("ttl %v: must be positive and at most %v", o.TTL, maxTTL))
	}
	if len(o.Description) > 1024 {
		errs = append(errs, errors.New("description: longer than 1024 bytes"))
	}
	return errors.Join(errs...)
}

// CreateToken makes a join token in namespace and returns it. It cannot be read
// again: only its hash is kept.
func CreateToken(ctx context.Context, client kubernetes.Interface, namespace string, options TokenOptions) (string, error) {
	if err := options.check(); err != nil {
		return "", fmt.Errorf("create token: %w", err)
	}
	id, secret := randomText(6), randomText(16)
	data := map[string]string{
		keyID:          id,
		keyHash:        hashSecret(secret),
		keyUsage:       "true",
		keyExpiration:  time.Now().Add(cmp.Or(options.TTL, defaultTTL)).UTC().Format(time.RFC3339),
		keyDescription: options.Description,
		keySite:        options.Site,
		keyReplace:     flag(options.Replace),
		keyReusable:    flag(options.Reusable),
		keyRedeemed:    nobody,
	}
	object := &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: tokenPrefix + id, Labels: map[string]string{tokenLabel: ""}},
		Type:       tokenType,
		Data:       map[string][]byte{},
	}
	for key, value := range data {
		if value != "" {
			object.Data[key] = []byte(value)
		}
	}
	_, err := client.CoreV1().Secrets(cmp.Or(namespace, DefaultNamespace)).Create(ctx, object, metav1.CreateOptions{})
	if err != nil {
		return "", fmt.Errorf("create token: %w", err)
	}
	return id + "." + secret, nil
}

// JoinCommand is the line to run at a site. site may be empty: then the machine
// goes by its host name.
func JoinCommand(server, token, pin, site string) string {
	line := fmt.Sprintf("edgelet join %s --token %s --ca-cert-hash %s", server, token, pin)
	if site != "" {
		line += " --site " + site
	}
	return line
}

// A TokenInfo is a token as it can be listed.
type TokenInfo struct {
	ID          string
	Site        string
	Replace     bool
	Reusable    bool
	Expires     time.Time
	Description string
	RedeemedBy  string // site; empty: nobody yet
}

// ListTokens lists the join tokens of namespace.
func ListTokens(ctx context.Context, client kubernetes.Interface, namespace string) ([]TokenInfo, error) {
	list, err := client.CoreV1().Secrets(cmp.Or(namespace, DefaultNamespace)).List(ctx, metav1.ListOptions{LabelSelector: tokenLabel})
	if err != nil {
		return nil, fmt.Errorf("list tokens: %w", err)
	}
	var tokens []TokenInfo
	for i := range list.Items {
		secret := &list.Items[i]
		expires, err := expiration(secret)
		if secret.Type != tokenType || err != nil {
			continue
		}
		grant := grantOf(secret)
		tokens = append(tokens, TokenInfo{
			ID: grant.ID, Site: grant.Site, Replace: grant.Replace, Expires: expires, RedeemedBy: grant.UsedSite,
			Reusable:    string(secret.Data[keyReusable]) == "true",
			Description: string(secret.Data[keyDescription]),
		})
	}
	return tokens, nil
}

// DeleteToken removes a token by its ID, or by the whole of it.
func DeleteToken(ctx context.Context, client kubernetes.Interface, namespace, token string) error {
	id, _, _ := strings.Cut(token, ".")
	err := client.CoreV1().Secrets(cmp.Or(namespace, DefaultNamespace)).Delete(ctx, tokenPrefix+id, metav1.DeleteOptions{})
	if err != nil {
		return fmt.Errorf("delete token %s: %w", id, err)
	}
	return nil
}

// Tokens implements [bootstrap.Tokens] on Secrets. It is safe for concurrent use
// by any number of replicas.
type Tokens struct {
	client    kubernetes.Interface
	namespace string
	log       *slog.Logger
}

// TokensConfig says where tokens are kept.
type TokensConfig struct {
	Client    kubernetes.Interface // required
	Namespace string               // default DefaultNamespace
	Log       *slog.Logger         // default slog.Default()
}

// NewTokens returns the tokens of a namespace.
func NewTokens(config TokensConfig) (*Tokens, error) {
	if config.Client == nil {
		return nil, errors.New("tokens: Client is required")
	}
	return &Tokens{
		client:    config.Client,
		namespace: cmp.Or(config.Namespace, DefaultNamespace),
		log:       cmp.Or(config.Log, slog.Default()),
	}, nil
}

// Check implements [bootstrap.Tokens].
func (t *Tokens) Check(ctx context.Context, token string) (bootstrap.Grant, error) {
	secret, err := t.get(ctx, token)
	if err != nil {
		return bootstrap.Grant{}, err
	}
	return grantOf(secret), nil
}

// get returns the Secret of a token that is good at this time.
func (t *Tokens) get(ctx context.Context, token string) (*corev1.Secret, error) {
	// Before the API server is asked: the ID becomes part of a name.
	if !bootstrap.ValidToken(token) {
		return nil, bootstrap.TokenUnknown
	}
	id, text, _ := strings.Cut(token, ".")
	secret, err := t.client.CoreV1().Secrets(t.namespace).Get(ctx, tokenPrefix+id, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, bootstrap.TokenUnknown
	}
	if err != nil {
		return nil, fmt.Errorf("token %s: %w", id, err)
	}
	good := subtle.ConstantTimeCompare(secret.Data[keyHash], []byte(hashSecret(text))) == 1
	if !good || secret.Type != tokenType || string(secret.Data[keyID]) != id ||
		string(secret.Data[keyUsage]) != "true" || secret.DeletionTimestamp != nil {
		return nil, bootstrap.TokenUnknown
	}
	expires, err := expiration(secret)
	if err != nil || !time.Now().Before(expires) {
		return nil, bootstrap.TokenExpired
	}
	return secret, nil
}

// A redemption says who has used a token.
type redemption struct {
	Key  string    `json:"key"`
	Site string    `json:"site"`
	At   time.Time `json:"at"`
}

func grantOf(secret *corev1.Secret) bootstrap.Grant {
	grant := bootstrap.Grant{
		ID:      string(secret.Data[keyID]),
		Site:    string(secret.Data[keySite]),
		Replace: string(secret.Data[keyReplace]) == "true",
	}
	if string(secret.Data[keyReusable]) == "true" || string(secret.Data[keyRedeemed]) == nobody {
		return grant
	}
	var by redemption
	if err := json.Unmarshal(secret.Data[keyRedeemed], &by); err != nil {
		by = redemption{Key: "unreadable", Site: "unreadable"} // used, by whom we cannot say
	}
	grant.UsedKey, grant.UsedSite, grant.UsedAt = by.Key, by.Site, by.At
	return grant
}

// Redeem implements [bootstrap.Tokens]: the API server itself compares and swaps.
func (t *Tokens) Redeem(ctx context.Context, token, site, key string) error {
	secret, err := t.get(ctx, token)
	if err != nil {
		return err
	}
	if string(secret.Data[keyReusable]) == "true" {
		return nil
	}
	used := func(grant bootstrap.Grant) error {
		if grant.UsedKey != key || grant.UsedSite != site {
			return bootstrap.TokenUsed
		}
		return nil
	}
	if grant := grantOf(secret); grant.UsedKey != "" {
		return used(grant)
	}
	by, err := json.Marshal(redemption{Key: key, Site: site, At: time.Now().UTC().Truncate(time.Second)})
	if err != nil {
		return fmt.Errorf("redeem token: %w", err)
	}
	// As JSON, values of a Secret are base64, which []byte becomes.
	patch, err := json.Marshal([]operation{
		{Op: "test", Path: "/data/" + keyRedeemed, Value: []byte(nobody)},
		{Op: "replace", Path: "/data/" + keyRedeemed, Value: by},
	})
	if err != nil {
		return fmt.Errorf("redeem token: %w", err)
	}
	_, err = t.client.CoreV1().Secrets(t.namespace).Patch(ctx, secret.Name, types.JSONPatchType, patch, metav1.PatchOptions{})
	if err == nil {
		return nil
	}
	// Someone was faster, or only the answer was lost: the object knows.
	after, getErr := t.get(ctx, token)
	if getErr != nil {
		return errors.Join(getErr, err)
	}
	if grant := grantOf(after); grant.UsedKey != "" {
		return used(grant)
	}
	return fmt.Errorf("redeem token: %w", err)
}

// Run removes tokens a day after they have expired, until ctx is done, which is
// no error. Any number of replicas may do so.
func (t *Tokens) Run(ctx context.Context) error {
	for {
		if err := t.collect(ctx); err != nil && ctx.Err() == nil {
			t.log.Warn("expired join tokens not removed; trying again", "in", collectEvery, "err", err)
		}
		// Apart, so that replicas that started together do not work together.
		if backoff.Sleep(ctx, collectEvery+backoff.Delay(0, collectEvery/4, collectEvery/4)) != nil {
			return nil
		}
	}
}

func (t *Tokens) collect(ctx context.Context) error {
	tokens, err := ListTokens(ctx, t.client, t.namespace)
	if err != nil {
		return err
	}
	var errs []error
	for _, token := range tokens {
		if time.Since(token.Expires) < keepExpired {
			continue
		}
		if err := DeleteToken(ctx, t.client, t.namespace, token.ID); err != nil && !apierrors.IsNotFound(err) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func expiration(secret *corev1.Secret) (time.Time, error) {
	return time.Parse(time.RFC3339, string(secret.Data[keyExpiration]))
}

func hashSecret(secret string) string {
	sum := sha256.Sum256([]byte(secret))
	return hex.EncodeToString(sum[:])
}

// randomText returns n characters of a-z and 0-9, each equally likely.
func randomText(n int) string {
	const alphabet = "abcdefghijklmnopqrstuvwxyz0123456789"
	text := make([]byte, 0, n)
	for len(text) < n {
		var b [32]byte
		_, _ = rand.Read(b[:]) // never fails
		for _, c := range b {
			if limit := byte(256 / len(alphabet) * len(alphabet)); c < limit && len(text) < n {
				text = append(text, alphabet[int(c)%len(alphabet)])
			}
		}
	}
	return string(text)
}

func flag(set bool) string {
	if set {
		return "true"
	}
	return ""
}
