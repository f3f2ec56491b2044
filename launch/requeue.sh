# What train.sbatch and experiment.sbatch do alike: hand the warning of their end on to their step, and come back where
# the step has left on it.
# shellcheck shell=bash

# How often in a row a job may come back without having saved anything.
futile_starts=3

step=
warned=
trap 'warned=yes; [ -z "$step" ] || kill -USR1 "$step"' USR1

# wait_for PROCESS JOB: exits as the process does, once JOB is in the queue again if that is where it belongs.
wait_for() {
    step=$1
    local job=$2 code=0
    local futile=.futile-starts-$job # a line for each start in a row, in the folder that sbatch was called in
    [ -z "$warned" ] || kill -USR1 "$step"
    wait "$step" || code=$?
    while kill -0 "$step" 2>/dev/null; do # the signal ended the wait, not the step
        code=0
        wait "$step" || code=$?
    done

    # 75: saved, come again (babl/distributed/failure.py). Above 128: the signal came before there was anything to save.
    if [ -n "$warned" ] && [ "$code" -gt 128 ]; then
        date >>"$futile"
        if [ "$(wc -l <"$futile")" -ge "$futile_starts" ]; then
            rm "$futile"
            echo "launch: job $job was told to leave $futile_starts times in a row before it had saved a step;" \
                "give it more time (sbatch --time, or a later --signal)" >&2
            exit 1
        fi
    else
        rm -f "$futile"
        if [ "$code" -ne 75 ]; then
            exit "$code"
        fi
    fi
    echo "launch: job $job goes back into the queue" >&2
    scontrol requeue "$job"
    exit "$code"
}
