package bootstrap

// ServerName is the name in every provider's certificate, by which sites know it.
// What they trust is the CA that they pinned; under which address it is reached
// matters to nobody, so there is nothing that could be configured wrongly.
const ServerName = "provider.skerry.io"
