package certs

import (
	"log/slog"
	"time"
)

// A Status is what operators watch.
type Status struct {
	// CertNotAfter is when the server's own certificate expires.
	CertNotAfter time.Time

	// CAs are in the order of the configuration.
	CAs []CAStatus

	// ReloadError holds the faults of the last reload, nil if it was good. What
	// it names is served as it was before.
	ReloadError error
}

// A CAStatus is the status of one client CA.
type CAStatus struct {
	Name string

	// NotAfter is when the first of the CA's certificates expires.
	NotAfter time.Time

	// CRLNextUpdate is when the first of its revocation lists is due, zero
	// without any.
	CRLNextUpdate time.Time

	// CRL is the state of the list that is worst off.
	CRL CRLState

	// NoCRL has the subjects of the CA's certificates whose list is missing in
	// its CRL file. What they have issued is refused.
	NoCRL []string
}

// A CRLState tells how far the revocation lists of a CA can be relied upon.
type CRLState int

const (
	CRLNone     CRLState = iota // the CA has no revocation lists
	CRLCurrent                  // before nextUpdate
	CRLStale                    // past nextUpdate, within the grace period: still applies
	CRLRefusing                 // past the grace period: its issuer's certificates are refused
)

func (c CRLState) String() string {
	switch c {
	case CRLCurrent:
		return "current"
	case CRLStale:
		return "stale"
	case CRLRefusing:
		return "refusing"
	}
	return "none"
}

// Status returns the status as of now.
func (s *Server) Status() Status {
	st := s.current.Load()
	now := s.opts.Now()
	status := Status{CertNotAfter: st.pair.Leaf.NotAfter}
	for _, ca := range st.cas {
		status.CAs = append(status.CAs, ca.status(now, s.opts.CRLGrace))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	status.ReloadError = s.fault
	return status
}

func (t *trust) status(now time.Time, grace time.Duration) CAStatus {
	c := CAStatus{Name: t.Name, NotAfter: t.certs[0].NotAfter}
	for _, cert := range t.certs {
		c.NotAfter = earliest(c.NotAfter, cert.NotAfter)
		if t.CRLFile != "" && t.lists[issuerOf(cert)] == nil {
			c.NoCRL = append(c.NoCRL, cert.Subject.String())
		}
	}
	for _, l := range t.lists {
		if c.CRLNextUpdate.IsZero() || l.nextUpdate.Before(c.CRLNextUpdate) {
			c.CRLNextUpdate = l.nextUpdate
		}
	}
	switch {
	case c.CRLNextUpdate.IsZero():
		c.CRL = CRLNone
	case now.After(c.CRLNextUpdate.Add(grace)):
		c.CRL = CRLRefusing
	case now.After(c.CRLNextUpdate):
		c.CRL = CRLStale
	default:
		c.CRL = CRLCurrent
	}
	return c
}

// A watch is what Run has said so far, so that it says each thing once.
type watch struct {
	log    *slog.Logger
	faults map[string]bool
	stale  map[string]CRLState
}

func (w *watch) report(changed []string, faults []error, status Status) {
	now := make(map[string]bool, len(faults))
	for _, fault := range faults {
		text := fault.Error()
		if now[text] = true; !w.faults[text] {
			w.log.Error("certificates: the last good state stays in use", "fault", text)
		}
	}
	ended := len(w.faults) > 0 && len(faults) == 0
	w.faults = now
	if ended || len(changed) > 0 && len(faults) == 0 {
		w.log.Info("certificates reloaded", "changed", changed)
	}
	for _, ca := range status.CAs {
		if w.stale[ca.Name] == ca.CRL {
			continue
		}
		w.stale[ca.Name] = ca.CRL
		switch ca.CRL {
		case CRLStale:
			w.log.Warn("revocation list is past its nextUpdate and still applies", "ca", ca.Name, "due", ca.CRLNextUpdate)
		case CRLRefusing:
			w.log.Error("revocation list is past its grace period: its certificates are refused", "ca", ca.Name, "due", ca.CRLNextUpdate)
		}
	}
}
