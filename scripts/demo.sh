#!/usr/bin/env bash
# Shows the main job end to end, on real media: a film clip is encrypted with a
# key that was born in an HSM, and played with the same key, which the DRM
# provider's callback fetched. `make demo` runs it after it has built bin/ and
# installed ffmpeg and SoftHSM2.
#
# It ends with 0 only if everything that it says is true. It leaves nothing
# behind: custody, keys and films lie in a folder that is removed at the end.
#
# Keys live in shell variables and are not printed. They are on the command line
# of ffmpeg, where other users of the machine can see them: ffmpeg takes them in
# no other way. A real packager asks the daemon itself.
set -euo pipefail
set +x
umask 077

root=$(cd "$(dirname "$0")/.." && pwd)
began=$SECONDS
work=$(mktemp -d "${TMPDIR:-/tmp}/custodian-demo.XXXXXX")
daemon=

finish() {
	status=$?
	trap - EXIT
	if [ -n "$daemon" ]; then
		kill -KILL "$daemon" 2>/dev/null || true
		wait "$daemon" 2>/dev/null || true
	fi
	if [ "$status" -ne 0 ]; then
		echo "demo: something did not hold, see above" >&2
		if [ -s "$work/daemon.log" ]; then
			echo "demo: the last lines of the daemon's log:" >&2
			tail -n 20 "$work/daemon.log" >&2
		fi
	fi
	rm -rf "$work"
	exit "$status"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

die() { echo "demo: $*" >&2; exit 1; }

number=0
step() { number=$((number + 1)); printf '\n%d. %s\n' "$number" "$*"; }
say() { printf '   %s\n' "$*"; }

# as ROLE COMMAND...: custodianctl with the certificate of that role.
as() {
	role=$1
	shift
	"$root/bin/custodianctl" --config "$work/custody/$role.yaml" "$@"
}

# field NAME JSON: the first field of that name, each of which has a line of its
# own in what custodianctl prints. printf is part of the shell, so that no key
# comes on a command line here.
field() { printf '%s\n' "$2" | sed -n 's/^ *"'"$1"'": "\{0,1\}\([^",]*\)"\{0,1\},\{0,1\}$/\1/p' | head -n 1; }

media() { ffmpeg -nostdin -hide_banner -loglevel error -y "$@"; }

# frames FILE: the hash of each decoded frame that is in a framemd5 file.
frames() { sed '/^#/d' "$1"; }

# hashes FILE: only the hashes, whatever the time of a frame.
hashes() { frames "$1" | sed 's/.*, *//' | sort; }

# frames_in_common FILE FILE: how many frames two framemd5 files share.
frames_in_common() { comm -12 <(hashes "$1") <(hashes "$2") | wc -l; }

for program in ffmpeg softhsm2-util; do
	command -v "$program" >/dev/null || die "$program is missing: make demo installs it"
done
for program in custodiand custodianctl; do
	[ -x "$root/bin/$program" ] || die "bin/$program is missing: make demo builds it"
done

echo "Custodian: from a key in an HSM to a film that plays"

step "A film: two tracks, made by ffmpeg"
media -f lavfi -i testsrc2=size=640x360:rate=25:duration=4 -f lavfi -i sine=frequency=440:sample_rate=48000:duration=4 \
	-c:v libx264 -preset veryfast -pix_fmt yuv420p -c:a aac -shortest "$work/clear.mp4"
media -i "$work/clear.mp4" -map 0 -f framemd5 "$work/clear.md5"
total=$(frames "$work/clear.md5" | wc -l)
[ "$total" -gt 100 ] || die "the clip has only $total frames"
say "H.264 and AAC, $(stat -c %s "$work/clear.mp4") bytes, $total decoded frames of picture and sound, each with its hash"

step "A custody: a SoftHSM token, a root key in it, certificates for five roles, the daemon"
"$root/bin/custodiand" dev -dir "$work/custody" -listen 127.0.0.1:0 -admin 127.0.0.1:0 -packagers 127.0.0.1:0 >"$work/daemon.out" 2>"$work/daemon.log" &
daemon=$!
for ((i = 0; i < 600; i++)); do
	if grep -q '^custodiand: ready on ' "$work/daemon.out"; then break; fi
	kill -0 "$daemon" 2>/dev/null || die "the daemon ended"
	sleep 0.1
done
address=$(sed -n 's/^custodiand: ready on //p' "$work/daemon.out")
[ -n "$address" ] || die "the daemon is not ready after a minute"
say "it serves mutual TLS on $address"

step "The officer makes the category movies: a key-encryption key, in the token only"
made=$(as officer category create movies)
say "$made"

step "The packager asks for a content key, and encrypts the film with it"
answer=$(as packager keys issue --category movies --content demo-film --track HD --scheme cenc --json --reveal)
kid=$(field kid "$answer")
packager_key=$(field key "$answer")
unset answer
[[ $kid =~ ^[-0-9a-f]{36}$ ]] || die "the answer has no KID"
[[ $packager_key =~ ^[0-9a-f]{32}$ ]] || die "the answer has no key"
media -i "$work/clear.mp4" -map 0 -c copy \
	-encryption_scheme cenc-aes-ctr -encryption_key "$packager_key" -encryption_kid "${kid//-/}" "$work/encrypted.mp4"
say "KID $kid, common encryption (cenc, AES-128-CTR), $(stat -c %s "$work/encrypted.mp4") bytes"

step "Without the key, and with another one, there is no film"
# ffmpeg stumbles over what it cannot read; all that counts is what comes out.
media -i "$work/encrypted.mp4" -map 0 -f framemd5 "$work/nokey.md5" 2>/dev/null || true
media -decryption_key "$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')" -i "$work/encrypted.mp4" -map 0 -f framemd5 "$work/wrongkey.md5" 2>/dev/null || true
for kind in nokey wrongkey; do
	touch "$work/$kind.md5"
	same=$(frames_in_common "$work/clear.md5" "$work/$kind.md5")
	[ "$same" -eq 0 ] || die "$same frames come out of the encrypted film as they were ($kind)"
	say "$(printf '%-10s %d frames come out, none of them as it was' "${kind%key} key:" "$(frames "$work/$kind.md5" | wc -l)")"
done

step "The DRM provider calls back for the key of that KID, and the film plays"
answer=$(as drm-provider keys get "$kid" --content demo-film --json --reveal)
provider_key=$(field key "$answer")
receipt=$(field index "$answer")
unset answer
[[ $provider_key =~ ^[0-9a-f]{32}$ ]] || die "the answer has no key"
[ "$provider_key" = "$packager_key" ] || die "packager and provider have different keys"
media -decryption_key "$provider_key" -i "$work/encrypted.mp4" -map 0 -f framemd5 "$work/decrypted.md5"
unset packager_key provider_key
cmp <(frames "$work/clear.md5") <(frames "$work/decrypted.md5") || die "the decrypted film is another one"
say "it is the packager's key; all $total frames are as they were"

step "The packager's certificate asks for the same key in the provider's way: refused"
refused=0
as packager keys get "$kid" --reveal >"$work/refused.out" 2>"$work/refused.err" || refused=$?
[ "$refused" -eq 3 ] || die "exit code $refused instead of 3: $(cat "$work/refused.err")"
[ ! -s "$work/refused.out" ] || die "a refused call printed something"
say "exit code 3: $(sed -n 's/^custodianctl: //p' "$work/refused.err")"

shaka=$("$root/scripts/setup.sh" --shaka)
if [ -x "$shaka" ]; then
	door=$(sed -n 's|^Packagers: \(https://.*/categories/\)CATEGORY/|\1movies/|p' "$work/daemon.out")
	[ -n "$door" ] || die "the daemon does not say where packagers knock"

	step "Second act: Shaka Packager, unmodified, asks for keys by itself and packages for four DRM systems"
	pack() { (cd "$work" && "$shaka" --quiet "$@") >"$work/packager.log" 2>&1 || { tail -n 5 "$work/packager.log" >&2; die "the packager failed"; }; }
	pki=$work/custody/pki
	pack in=clear.mp4,stream=video,output=clear-video.mp4 in=clear.mp4,stream=audio,output=clear-audio.mp4
	pack in=clear.mp4,stream=video,output=drm-video.mp4 in=clear.mp4,stream=audio,output=drm-audio.mp4 \
		--enable_widevine_encryption --key_server_url "$door" --content_id "$(printf second-film | od -An -tx1 | tr -d ' \n')" \
		--protection_scheme cbcs --protection_systems Widevine,PlayReady,FairPlay,CommonSystem --clear_lead 0 \
		--ca_file "$pki/ca.pem" --client_cert_file "$pki/packager.pem" --client_cert_private_key_file "$pki/packager.key" \
		--mpd_output film.mpd --hls_master_playlist_output film.m3u8
	mapfile -t kids < <(sed -n 's/.*cenc:default_KID="\([-0-9a-f]*\)".*/\1/p' "$work/film.mpd" | sort -u)
	[ "${#kids[@]}" -eq 2 ] || die "the manifest names ${#kids[@]} KIDs instead of 2"
	for system in edef8ba9-79d6-4ace-a3c8-27dcd51d21ed 9a04f079-9840-4286-ab92-e65be0885f95 1077efec-c0b2-4d02-ace3-3c1e52e2fb4b; do
		grep -q "urn:uuid:$system" "$work/film.mpd" || die "the manifest lacks the DRM system $system"
	done
	grep -q com.apple.streamingkeydelivery "$work"/*.m3u8 || die "the playlists lack FairPlay"
	say "DASH and HLS, cbcs, for Widevine, PlayReady, FairPlay and ClearKey; a key for picture and one for sound"

	step "The DRM provider calls back for both keys, and the second film plays"
	for kid2 in "${kids[@]}"; do
		answer=$(as drm-provider keys get "$kid2" --content second-film --json --reveal)
		key2=$(field key "$answer")
		case $(field track_type "$answer") in
		AUDIO) track=audio ;;
		*) track=video ;;
		esac
		unset answer
		[[ $key2 =~ ^[0-9a-f]{32}$ ]] || die "the answer has no key"
		media -i "$work/clear-$track.mp4" -map 0 -f framemd5 "$work/clear-$track.md5"
		media -decryption_key "$key2" -i "$work/drm-$track.mp4" -map 0 -f framemd5 "$work/drm-$track.md5"
		unset key2
		cmp <(frames "$work/clear-$track.md5") <(frames "$work/drm-$track.md5") || die "the decrypted $track is another one"
		say "KID $kid2: all $(frames "$work/drm-$track.md5" | wc -l) frames of $track are as they were"
	done
else
	printf '\nThe second act is left out: there is no Shaka Packager here, and npm could not get it.\n'
fi

step "The daemon ends, and the auditor checks its log without it"
kill -TERM "$daemon"
ended=0
wait "$daemon" || ended=$?
daemon=
[ "$ended" -eq 0 ] || die "the daemon ended with exit code $ended"
log=$work/custody/data/audit
report=$("$root/bin/custodianctl" audit verify --dir "$log" --json)
entries=$(field entries "$report")
merkle_root=$(field root "$report")
[ "$entries" -gt "$receipt" ] && [[ $merkle_root =~ ^[0-9a-f]{64}$ ]] || die "the audit log verifies, but says nothing"
released=$("$root/bin/custodianctl" audit list --dir "$log" --kid "$kid" --action release --outcome allowed --json)
[[ $released == "{\"index\":$receipt,"* ]] || die "the release with receipt $receipt is not in the log"
denied=$("$root/bin/custodianctl" audit list --dir "$log" --kid "$kid" --action release --outcome denied --json)
[[ $denied == *'"reason":"DENIED"'* ]] || die "the refused call is not in the log"
say "$entries entries verify; Merkle root $merkle_root"
say "entry $receipt is the release of KID $kid; the refused call is there too"

echo
echo "All of it held, in $((SECONDS - began)) s. Nothing is left running or on disk."
