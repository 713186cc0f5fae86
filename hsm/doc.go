// Package hsm drives one token of a PKCS#11 module: it decides how the module
// is loaded, logged in to, shared between goroutines, tested and recovered,
// and which templates keys are made with. What the keys are for, who may use
// them and when is left to its callers; it knows nothing of custody.
//
// # Keys
//
// A MEK is a token object that wraps and unwraps, and does nothing else. A Key
// is an AES-256 key that was generated inside the token, rests outside of it
// wrapped under a MEK (AES-256 KWP, RFC 5649), and is used as a session object
// that cannot leave again. A signer is an ECDSA P-256 or Ed25519 pair of token objects.
// No key ever exists in clear in this process. Every wrap, seal and signature
// is verified by the opposite operation before it is handed out, because a
// token can silently hand back another key than the one that was meant.
//
// # Epochs
//
// A module hands out small integers as handles and starts over after it was
// initialised again, so an old handle can name another key. The epoch counts
// the connections to the token, from 1; each handle belongs to one. A Key of an
// older epoch answers ErrStale and has to be loaded again; MEKs and signers are
// found again by the token itself.
//
// # Calls that hang
//
// A call into a module cannot be cancelled. Each session belongs to a worker
// goroutine with buffers of its own; a caller waits for the worker or for its
// context. An abandoned call keeps its worker, session and buffers until it
// ends, so no more calls can be abandoned than there are sessions. Before the
// module is finalised every worker is called in; if one does not come within
// Config.DrainTimeout, Config.OnFatal is called, because the process has to be
// restarted.
package hsm
