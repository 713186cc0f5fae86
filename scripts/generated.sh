#!/usr/bin/env bash
# Says whether the generated code under api/ is what its protos give now.
set -euo pipefail
cd "$(dirname "$0")/.."
fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT

bin/tools/buf generate -o "$fresh"
if [ -z "$(find "$fresh" -name '*.pb.go')" ]; then
	echo "generated code: the protos under api/ gave none" >&2
	exit 1
fi
# Only generated files are compared: a proto that is gone leaves one too many.
status=0
while read -r file; do
	diff -u "$file" "$fresh/$file" --label "$file" --label "$file, generated now" -N | head -n 40 || status=1
done < <({ find api -name '*.pb.go'; cd "$fresh" && find api -name '*.pb.go'; } | sort -u)
if [ "$status" -ne 0 ]; then
	echo "generated code: not current: run make generate" >&2
fi
exit "$status"
