# Runs one step, keeps its exit code, and holds the lock that says so: descriptor 0 is the locked
# claim. process.py starts it, in a session of its own, with stdout and stderr going to the log.
#
#   supervisor.sh FOLDER CGROUP RESTARTS ON SYNC MV SLEEP COMMAND...
#
# FOLDER is the run's; CGROUP its control group or empty; RESTARTS how often COMMAND is started
# again (-1: without end) ON `always` or `failure`; then the host's tools by path, since PATH and
# the rest of the environment are the step's. For the same reason no variable is touched but ours.

# To end a restarting service, its agent tells us first, and then ends what runs. A trap, unlike an
# ignored signal, is not inherited by the step.
trap 'gamenode_restarts=0' TERM
trap : HUP INT

# Who we are, for an agent that finds us after its own restart; without it nothing may start.
read -r gamenode_stat <"/proc/$$/stat" && printf '%s\n' "$gamenode_stat" >"$1/supervisor" || exit 1

gamenode_restarts=$3
while :; do
    (
        [ -z "$2" ] || echo 0 >"$2/cgroup.procs" || exit 126
        shift 7
        exec "$@"
    ) </dev/null
    gamenode_code=$?
    [ "$gamenode_restarts" -eq 0 ] && break
    [ "$4" = failure ] && [ "$gamenode_code" -eq 0 ] && break
    [ -z "$2" ] || echo 1 >"$2/cgroup.kill" # what the old one left must not meet the new one
    "$7" 1
    [ "$gamenode_restarts" -eq 0 ] && break
    gamenode_restarts=$((gamenode_restarts - 1))
done

# On a full disk the exit code waits for room, as long as anybody can want it.
until echo "$gamenode_code" >"$1/exit.new" && "$5" "$1/exit.new" && "$6" "$1/exit.new" "$1/exit"; do
    [ -d "$1" ] || exit 1
    "$7" 1
done
