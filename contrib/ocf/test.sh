#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# test.sh OCF: tests the resource agent beside this file, without a cluster,
# libvirt or ftvirt. In OCF are the files of Debian's package resource-agents,
# whose ocf-tester has its say first; then come the agent's own cases. ftvirt and
# virsh are stand-ins that keep what they know in a directory.
set -eu
here=$(realpath "$(dirname "$0")")
files=$(realpath "$1")
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM
chmod 0755 "$dir" # ocf-tester reads the metadata as nobody
mkdir "$dir/bin" "$dir/now" "$dir/run"
cp -r "$files/usr" "$dir"
install -m 0755 "$here/ftvirt" "$dir/agent"
touch "$dir/ftvirt.toml"

# What is in now: active (libvirt has the domain running), role, state, peer, annotation, and
# switches: hung (virsh is stopped, and so never ends), no-libvirt, no-agent, refuse-start, deaf (does not shut down),
# stays (does not fail over). log has what was asked for.
cat >"$dir/bin/virsh" <<'VIRSH'
#!/bin/sh
cd "$NOW"
[ "$1 $2 $3" = "-q -c test:///ft" ] || { echo "virsh $*" >>unexpected; exit 1; }
shift 3
[ "$1" = list ] || [ "$1" = metadata ] || echo "virsh $1" >>log
[ ! -e hung ] || kill -STOP $$
[ -e no-libvirt ] && read -r left <no-libvirt
[ "${left:-}" != 0 ] || rm no-libvirt
[ -z "${left:-}" ] || [ "$left" = 0 ] || echo $((left - 1)) >no-libvirt
[ ! -e no-libvirt ] || { echo "error: failed to connect to the hypervisor" >&2; exit 1; }
case "$*" in
"list --name") echo other; echo web-2; [ ! -e active ] || echo web ;;
"metadata web urn:ftvirt:domain:1") cat annotation 2>/dev/null ;;
"start web")
	[ ! -e refuse-start ] || { echo "error: the hook refuses it: host hostb owns it" >&2; exit 1; }
	[ ! -e active ] || { echo "error: Domain is already active" >&2; exit 1; }
	touch active; echo primary >role; echo live >state; echo - >peer ;;
"shutdown web") [ -e deaf ] || rm -f active ;;
"destroy web") rm -f active ;;
*) echo "virsh $*" >>unexpected; exit 1 ;;
esac
VIRSH
cat >"$dir/bin/ftvirt" <<'FTVIRT'
#!/bin/sh
cd "$NOW"
command=$1
[ "$2 $3" = "--config $TOML" ] || { echo "ftvirt $*" >>unexpected; exit 1; }
shift 3
if [ -e no-agent ]; then
	read -r left <no-agent
	if [ "${left:-1}" -gt 0 ]; then
		[ -z "$left" ] || echo $((left - 1)) >no-agent
		echo "the agent does not run" >&2
		exit 4
	fi
	rm no-agent
fi
case "$command $*" in
'status --format {{.role}} {{.state}} {{or .peer "-"}} web')
	echo "$(cat role) $(cat state) $(cat peer)"
	# A backup whose primary was lost goes live by the second look.
	if [ "$(cat role) $(cat state)" = "backup going-live" ]; then echo primary >role; echo live >state; fi
	# And a clone is complete.
	if [ "$(cat state)" = cloning ]; then echo protected >state; fi ;;
"migrate-backup web "*) echo "ftvirt migrate-backup $2" >>log; echo cloning >state; echo "$2" >peer ;;
"failover web") echo "ftvirt failover" >>log; [ -e stays ] || { echo failed >state; (sleep 0.2; rm -f active) & } ;;
*) echo "ftvirt $command $*" >>unexpected; exit 1 ;;
esac
FTVIRT
chmod 0755 "$dir/bin/virsh" "$dir/bin/ftvirt"

export NOW="$dir/now" TOML="$dir/ftvirt.toml" OCF_ROOT="$dir/usr/lib/ocf" PATH="$dir/bin:$PATH"
# Nothing of the agent's is to go to the machine's own places.
export HA_RSCTMP="$dir/run" HA_LOGFILE="$dir/log" HA_LOGFACILITY=none HA_LOGD=no
failed=0

now() { # ROLE STATE PEER: it runs here as that; without arguments it does not
	rm -f "$NOW"/*
	printf '%s\n' "${1:-none}" >"$NOW/role"
	printf '%s\n' "${2:-unprotected}" >"$NOW/state"
	printf '%s\n' "${3:--}" >"$NOW/peer"
	[ $# = 0 ] || touch "$NOW/active"
}

# expect CODE LOG ACTION [NAME=VALUE...]: the action ends with the code, and asked
# for what is in LOG, one after the other.
expect() {
	code=$1 log=$2 action=$3
	shift 3
	got=0
	env OCF_RESOURCE_INSTANCE=web OCF_RESKEY_domain=web OCF_RESKEY_uri=test:///ft OCF_RESKEY_config="$TOML" \
		OCF_RESKEY_CRM_meta_timeout=8000 OCF_RESKEY_CRM_meta_interval=10000 __OCF_ACTION="$action" \
		"$@" timeout 20 "$dir/agent" "$action" >"$dir/out" 2>&1 || got=$?
	asked=$(paste -sd, "$NOW/log" 2>/dev/null || :)
	if [ "$got" != "$code" ] || [ "$asked" != "$log" ] || [ -e "$NOW/unexpected" ]; then
		echo "FAIL $action with $*: code $got, not $code; asked for '$asked', not '$log'; $(cat "$NOW/unexpected" 2>/dev/null)"
		cat "$dir/out"
		failed=1
	fi
	cases=$((cases + 1))
}
cases=0

now
sed "s,^DATADIR=.*,DATADIR=$dir/usr/share," "$files/usr/sbin/ocf-tester" >"$dir/ocf-tester"
sh "$dir/ocf-tester" -n web -o domain=web -o uri=test:///ft -o config="$TOML" "$dir/agent"
[ ! -e "$NOW/unexpected" ] || { cat "$NOW/unexpected"; exit 1; }

# A backup is nothing to the cluster, whatever it does.
now; expect 7 '' monitor
for state in cloning protected going-live; do now backup $state hosta; expect 7 '' monitor; done
for state in unprotected cloning protected going-live live; do now primary $state hostb; expect 0 '' monitor; done
now primary failed hostb; expect 7 '' monitor
now none unprotected; expect 0 '' monitor # it runs and nobody asked for protection
now primary protected hostb; echo >"$NOW/no-libvirt"; expect 1 '' monitor
now primary protected hostb; echo 2 >"$NOW/no-libvirt"; expect 0 '' monitor # it was restarted

# An agent that is away for a moment is waited for; one that stays away harms no guest.
now primary protected hostb; echo 2 >"$NOW/no-agent"; expect 0 '' monitor
now backup protected hosta; echo 2 >"$NOW/no-agent"; expect 7 '' monitor
now primary live; echo >"$NOW/no-agent"; echo "<pair role='backup'/>" >"$NOW/annotation"; expect 0 '' monitor
expect 7 '' monitor OCF_RESKEY_CRM_meta_interval=0
now primary live; echo >"$NOW/no-agent"; echo "<pair mode='protected'/>" >"$NOW/annotation"
expect 0 '' monitor OCF_RESKEY_CRM_meta_interval=0

# A libvirtd that hangs is no reason to stop what runs, and nothing waits for it
# beyond the operation's limit.
now primary protected hostb; touch "$NOW/hung"; expect 0 '' monitor
now backup protected hosta; touch "$NOW/hung"; expect 7 '' monitor
now none unprotected; touch "$NOW/hung"; expect 1 '' monitor
now primary protected hostb; touch "$NOW/hung" "$NOW/no-agent"; expect 1 '' monitor
now primary protected hostb; touch "$NOW/hung"; expect 1 'virsh shutdown,virsh destroy' stop
now backup protected hosta; touch "$NOW/hung"; expect 0 '' stop

now; expect 0 'virsh start' start
now primary live; expect 0 '' start
now backup going-live hosta; expect 0 '' start   # the primary was lost
now backup protected hosta; expect 1 '' start    # it is not lost: nothing may force it
now; echo >"$NOW/no-libvirt"; expect 1 '' start
now; touch "$NOW/refuse-start"; expect 1 'virsh start' start
grep -q 'host hostb owns it' "$dir/out" || { echo "FAIL: start does not say why"; failed=1; }

now primary protected hostb; expect 0 'virsh shutdown' stop
now primary protected hostb; touch "$NOW/deaf"; expect 0 'virsh shutdown,virsh destroy' stop OCF_RESKEY_shutdown_timeout=1
now; expect 0 '' stop
now backup protected hosta; expect 0 '' stop
[ -e "$NOW/active" ] || { echo "FAIL: stop ended a backup"; failed=1; }
now primary protected hostb; echo >"$NOW/no-libvirt"; expect 1 '' stop
now primary protected hostb; echo 2 >"$NOW/no-libvirt"; expect 0 'virsh shutdown' stop
now backup protected hosta; echo >"$NOW/no-agent"; echo "<pair role='backup'/>" >"$NOW/annotation"; expect 1 '' stop

to=OCF_RESKEY_CRM_meta_migrate_target
now primary protected hostb; expect 0 'ftvirt failover' migrate_to $to=hostb
now primary protected hostb; expect 0 'ftvirt failover' migrate_to $to=node2 OCF_RESKEY_host_map='node1:hosta node2:hostb'
now primary protected hostb; expect 0 'ftvirt migrate-backup hostc,ftvirt failover' migrate_to $to=hostc
now primary cloning hostb; expect 0 'ftvirt failover' migrate_to $to=hostb
now primary live; expect 1 '' migrate_to $to=hostb
now primary protected hostb; touch "$NOW/stays"; expect 1 'ftvirt failover' migrate_to $to=hostb
now backup protected hosta; expect 1 '' migrate_to $to=hosta
now backup going-live hosta; expect 0 '' migrate_from
now backup protected hosta; expect 1 '' migrate_from

now
expect 6 '' validate-all OCF_RESKEY_domain=
expect 6 '' validate-all OCF_RESKEY_shutdown_timeout=1m
expect 6 '' validate-all OCF_RESKEY_host_map=node1
expect 5 '' validate-all OCF_RESKEY_config="$dir/none"
expect 3 '' promote

[ "$failed" = 0 ] || exit 1
echo "the resource agent passes $cases cases"
