# Runs one step, keeps its exit code, and holds the lock that says so: descriptor 1 is the locked
# claim. supervisors.py starts it, in the run's folder and in a session of its own, before there is
# a run; a word on descriptor 0 starts the step that `start` describes by then.
#
#   supervisor.sh CGROUP RESTARTS ON SYNC MV SLEEP
#
# CGROUP is the run's control group or empty; RESTARTS how often the step is started again (-1:
# without end) ON `always` or `failure`; then the host's tools by path, since PATH and the rest of
# the environment are the step's. For the same reason no variable is touched but ours.

# To end a restarting service, its agent tells us first, and then ends what runs. A trap, unlike an
# ignored signal, is not inherited by the step.
trap 'gamenode_restarts=0' TERM
trap : HUP INT

# Who we are, for an agent that finds us after its own restart; without it nothing may start.
read -r gamenode_stat <"/proc/$$/stat" && printf '%s\n' "$gamenode_stat" >supervisor || exit 1

gamenode_restarts=$2
gamenode_first=1
while :; do
    (
        # Before the word, since it can take ten milliseconds: the kernel waits for its readers.
        [ -z "$1" ] || echo 0 >"$1/cgroup.procs" || exit 126
        # Our agent ended, or thought better of it: nothing was started, and nothing is kept.
        [ -z "$gamenode_first" ] || read -r gamenode_word || { : >void && exit 1; }
        . ./start
    ) >>stdout 2>>stderr
    gamenode_code=$?
    [ ! -e void ] || exit 1
    gamenode_first=
    [ "$gamenode_restarts" -eq 0 ] && break
    [ "$3" = failure ] && [ "$gamenode_code" -eq 0 ] && break
    [ -z "$1" ] || echo 1 >"$1/cgroup.kill" # what the old one left must not meet the new one
    "$6" 1
    [ "$gamenode_restarts" -eq 0 ] && break
    gamenode_restarts=$((gamenode_restarts - 1))
done

# On a full disk the exit code waits for room, as long as anybody can want it.
until echo "$gamenode_code" >exit.new && "$4" exit.new && "$5" exit.new exit; do
    [ -e claim ] || exit 1
    "$6" 1
done
