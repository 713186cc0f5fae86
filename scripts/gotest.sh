#!/usr/bin/env bash
# Runs `go test -v` with its arguments and prints what a person wants to read: a
# line for each package, the reason of each skip, the whole output of a package
# that fails, and the totals. The whole output of all goes to bin/test.log.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p bin

status=0
go test -v "$@" 2>&1 | tee bin/test.log | awk '
	function forget() { split("", held); n = 0 }
	{ held[++n] = $0 }

	# A skip gives its reason in the line above.
	/^ *--- SKIP: / { skipped++; print; if (n > 1 && held[n-1] ~ /^ +[^ ]+:[0-9]+: /) print held[n-1]; fflush() }
	/^ *--- PASS: / { passed++ }
	/^ *--- FAIL: / { failed++ }

	# The last line of a package. Its own "FAIL" stands alone, a line above.
	/^ok[ \t]/     { print; fflush(); forget() }
	/^\?[ \t].*\[no test files\]$/ { forget() }
	/^FAIL[ \t]/   { broken++; for (i = 1; i <= n; i++) if (held[i] !~ /^(=== | *--- PASS: )/) print held[i]; fflush(); forget() }

	END {
		# What is left did not belong to a package: the go command itself spoke.
		for (i = 1; i <= n; i++) if (held[i] != "FAIL") print held[i]
		# A package that does not compile, or that panics, has no failed test.
		if (broken && !failed) failed = broken
		printf "%d passed, %d failed, %d skipped\n", passed, failed, skipped
	}' || status=$?
exit "$status"
