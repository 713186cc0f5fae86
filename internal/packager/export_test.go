package packager

// ParseForFuzz reads a request of the Widevine API as the listener does, and
// says how many tracks and periods it accepted.
func ParseForFuzz(body []byte) (tracks, periods int, err error) {
	e, err := parseEnvelope(body)
	if err != nil {
		return 0, 0, err
	}
	r, err := parseWidevine(e.Request)
	return len(r.Tracks), len(r.Periods), err
}

// ParseSOAPForFuzz reads a request to the PlayReady packaging server.
var ParseSOAPForFuzz = parseAcquirePackagingData
