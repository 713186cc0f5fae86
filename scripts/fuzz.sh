#!/usr/bin/env bash
# Runs every fuzz target of the module, one after the other, each for the time
# in the first argument (60s). It goes on after one that fails, and fails then.
set -euo pipefail
cd "$(dirname "$0")/.."
time=${1:-60s}

failed=()
count=0
while read -r package target; do
	count=$((count + 1))
	echo "fuzz: $package $target for $time"
	go test "$package" -run '^$' -fuzz "^$target\$" -fuzztime "$time" </dev/null || failed+=("$package $target")
done < <(git ls-files -co --exclude-standard -- '*_test.go' | sort |
	xargs -r awk '/^func Fuzz/ { sub(/^func /, ""); sub(/\(.*/, ""); dir = FILENAME; sub(/[^\/]*$/, "", dir); print "./" dir, $0 }')

if [ "$count" -eq 0 ]; then
	echo "fuzz: no target found" >&2
	exit 1
fi
if [ "${#failed[@]}" -gt 0 ]; then
	printf 'fuzz: failed: %s\n' "${failed[@]}" >&2
	exit 1
fi
echo "fuzz: $count targets, none failed"
