package anchor

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/keycustody/custodian/custodian"
	"github.com/keycustody/custodian/internal/checkpoint"
)

// A syslog is told of checkpoints in messages of RFC 5424, one for each. Over
// TCP they are framed by octet counting (RFC 6587, section 3.4.1). Nobody
// answers, so that a message went out is all that is known of it.
type syslog struct{ network, address string }

// priority is that of facility 13, log audit, and severity 5, notice.
const priority = 13*8 + 5

func (s *syslog) push(ctx context.Context, _ custodian.AnchoredLog, c checkpoint.Checkpoint, signed []byte) error {
	var conn net.Conn
	err := errors.New("no network")
	for _, network := range networks[s.network] {
		if conn, err = new(net.Dialer).DialContext(ctx, network, s.address); err == nil {
			break
		}
	}
	if err != nil {
		return err
	}
	defer conn.Close()
	if deadline, ok := ctx.Deadline(); ok {
		if err := conn.SetDeadline(deadline); err != nil {
			return err
		}
	}
	message := message(time.Now(), c, signed)
	if s.network == "tcp" {
		message = fmt.Appendf(nil, "%d %s", len(message), message)
	}
	_, err = conn.Write(message)
	return err
}

// networks are tried in this order: /dev/log is a datagram socket, mostly.
var networks = map[string][]string{"unix": {"unixgram", "unix"}, "udp": {"udp"}, "tcp": {"tcp"}}

// message is one message. The note is in base64, because lines end messages.
func message(now time.Time, c checkpoint.Checkpoint, signed []byte) []byte {
	host, err := os.Hostname()
	if err != nil || host == "" {
		host = "-"
	}
	return fmt.Appendf(nil, "<%d>1 %s %s custodiand %d CHECKPOINT - origin=%s size=%d root=%x note=%s", priority,
		now.UTC().Format("2006-01-02T15:04:05.000000Z"), host, os.Getpid(), c.Origin, c.Size, c.Root, base64.StdEncoding.EncodeToString(signed))
}
