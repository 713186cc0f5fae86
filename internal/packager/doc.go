// Package packager is how packagers and encoders talk to the daemon in the
// protocols that they already speak: the Widevine Common Encryption API, as
// Shaka Packager speaks it, and what those protocols carry: PSSH boxes and the
// signalling of DRM systems in DASH and HLS manifests.
//
// It decides how requests and answers look on the wire, and nothing about who
// may have a key: every front door is an encoding over Issue of the domain,
// which decides and writes down. What a refusal means to a caller is in
// internal/rpc/status.go.
package packager
