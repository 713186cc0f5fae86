#!/bin/sh
# Installs what a fresh Debian-like machine lacks to build, test and show
# Custodian. It prints nothing and changes nothing where nothing is missing.
#
#   setup.sh GROUP...       base: C compiler, git, certificates, SoftHSM2, Go;
#                           media: ffmpeg; shaka: Shaka Packager, from npm
#   setup.sh --go-bin       prints the folder for PATH in which a Go that this
#                           script has fetched lies, whether it is there or not
#   setup.sh --shaka        prints the same for Shaka Packager, as a file
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)

# The newest version that one of the project's modules asks for.
want=$(sed -n 's/^go //p' "$root"/go.mod "$root"/tools/go.mod "$root"/testservers/*/go.mod | sort -V | tail -n 1)
go_root=${XDG_CACHE_HOME:-$HOME/.cache}/custodian-go/go$want

# Shaka Packager, as an npm package that holds the programs of its own release.
shaka_version=3.4.2
shaka_sha512=4CN4guIvK8hIObBw2w/0kOh1JBnzpcHYMUW1LViGmfDOyFddEQ+mYtEjyYrDMkwfusHA2aR0nEBgp9MaDZEWDA==
shaka=${XDG_CACHE_HOME:-$HOME/.cache}/custodian-shaka/$shaka_version/packager

say() { echo "setup: $*"; }
die() { echo "setup: $*" >&2; exit 1; }

# lacks PACKAGE: what a package is wanted for is looked for, not the package:
# what was installed in another way serves as well.
lacks() {
	case $1 in
	gcc) ! command -v gcc ;;
	libc6-dev) ! test -e /usr/include/stdio.h ;;
	git) ! command -v git ;;
	ca-certificates) ! test -s /etc/ssl/certs/ca-certificates.crt ;;
	softhsm2) ! command -v softhsm2-util ;;
	ffmpeg) ! command -v ffmpeg ;;
	npm) ! command -v npm ;;
	openssl) ! command -v openssl ;;
	*) die "unknown package $1" ;;
	esac >/dev/null
}

apt_install() {
	command -v apt-get >/dev/null || die "missing: $*: install them, there is no apt-get here"
	as_root=
	if [ "$(id -u)" -ne 0 ]; then
		command -v sudo >/dev/null || die "missing: $*: install them as root"
		as_root=sudo
	fi
	say "installing $*"
	log=$(mktemp)
	if ! { $as_root apt-get -q -o DPkg::Lock::Timeout=300 update &&
		$as_root env DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300 \
			install --no-install-recommends "$@"; } >"$log" 2>&1 </dev/null; then
		tail -n 20 "$log" >&2
		rm -f "$log"
		die "install $*: apt-get did not succeed"
	fi
	rm -f "$log"
}

install_missing() {
	missing=
	for package in "$@"; do
		if lacks "$package"; then missing="$missing $package"; fi
	done
	# shellcheck disable=SC2086 # one word a package
	if [ -n "$missing" ]; then apt_install $missing; fi
}

# go_is_new_enough GO: a Go that reads go.mod and cannot get the version in it
# says nothing here, and counts as too old.
go_is_new_enough() {
	have=$(cd "$root" && "$1" env GOVERSION 2>/dev/null) || return 1
	have=${have#go}
	[ "$(printf '%s\n%s\n' "$want" "${have%% *}" | sort -V | head -n 1)" = "$want" ]
}

# fetch_go fetches the Go distribution as what it is to the go command: a module,
# with its checksum checked against the checksum database. Any old go command can
# do that. The module cache keeps no executable bits, and no file named go.mod;
# the copy gets both back.
fetch_go() {
	case $(uname -m) in
	x86_64) arch=amd64 ;;
	aarch64) arch=arm64 ;;
	*) die "fetch go $want: no name for the machine type $(uname -m): install go $want yourself" ;;
	esac
	say "fetching go $want"
	tmp=$(mktemp -d)
	trap 'rm -rf "$tmp"' EXIT
	echo 'module fetch' >"$tmp/go.mod"
	if ! (cd "$tmp" && GO111MODULE=on GOFLAGS=-mod=mod GOTOOLCHAIN=local GOWORK=off \
		go mod download -json "golang.org/toolchain@v0.0.1-go$want.linux-$arch") >"$tmp/answer" 2>"$tmp/errors"; then
		cat "$tmp/answer" "$tmp/errors" >&2
		die "fetch go $want: go mod download did not succeed"
	fi
	dir=$(sed -n 's/^[[:space:]]*"Dir": "\(.*\)",*$/\1/p' "$tmp/answer")
	[ -d "$dir" ] || die "fetch go $want: go mod download named no folder"

	mkdir -p "${go_root%/*}"
	rm -rf "$go_root.partial"
	cp -R "$dir" "$go_root.partial"
	chmod -R u+w "$go_root.partial"
	chmod -R a+x "$go_root.partial/bin" "$go_root.partial/pkg/tool"
	find "$go_root.partial" -name _go.mod | while read -r file; do
		cp "$file" "${file%_go.mod}go.mod"
	done
	rm -rf "$go_root"
	mv "$go_root.partial" "$go_root"
	rm -rf "$tmp"
	trap - EXIT
}

ensure_go() {
	if [ -x "$go_root/bin/go" ]; then return; fi
	if command -v go >/dev/null; then
		if go_is_new_enough go; then return; fi
	else
		apt_install golang-go
	fi
	if go_is_new_enough go; then return; fi
	fetch_go
	go_is_new_enough "$go_root/bin/go" || die "fetch go $want: what was fetched does not run"
}

# fetch_shaka takes one program out of the npm package, whose checksum is
# pinned. It is not installed with npm: nothing of it is to run here but the
# program.
fetch_shaka() {
	case $(uname -m) in
	x86_64) program=packager-linux-x64 ;;
	aarch64) program=packager-linux-arm64 ;;
	*) die "fetch Shaka Packager: no name for the machine type $(uname -m)" ;;
	esac
	install_missing npm openssl
	say "fetching Shaka Packager $shaka_version"
	tmp=$(mktemp -d)
	trap 'rm -rf "$tmp"' EXIT
	(cd "$tmp" && npm pack --silent "shaka-packager@$shaka_version" >/dev/null) || die "fetch Shaka Packager: npm pack did not succeed"
	file=$tmp/shaka-packager-$shaka_version.tgz
	sum=$(openssl dgst -sha512 -binary "$file" | openssl base64 -A)
	[ "$sum" = "$shaka_sha512" ] || die "fetch Shaka Packager: the package has the SHA-512 $sum, $shaka_sha512 is pinned"
	mkdir -p "${shaka%/*}"
	tar -xzf "$file" -C "$tmp" "package/bin/$program" package/LICENSE
	cp "$tmp/package/LICENSE" "${shaka%/*}/LICENSE"
	cp "$tmp/package/bin/$program" "$shaka.partial"
	chmod 755 "$shaka.partial"
	mv "$shaka.partial" "$shaka"
	rm -rf "$tmp"
	trap - EXIT
}

case ${1:-} in
--go-bin)
	echo "$go_root/bin"
	exit
	;;
--shaka)
	echo "$shaka"
	exit
	;;
'')
	die "which groups? base, media, shaka"
	;;
esac
for group in "$@"; do
	case $group in
	base)
		install_missing ca-certificates git gcc libc6-dev softhsm2
		ensure_go
		;;
	media) install_missing ffmpeg ;;
	shaka) [ -x "$shaka" ] || fetch_shaka ;;
	*) die "unknown group $group" ;;
	esac
done
