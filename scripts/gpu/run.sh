#!/usr/bin/env bash
# All that a GPU is asked, in parts of less than nine minutes each; needs no network.
#
#   scripts/gpu/run.sh 1 OUT     tests that need a GPU; the step of every method; precision, compiling and resuming
#   scripts/gpu/run.sh 2 OUT     how near to the peak (MAE ViT-B/16, LocalMIM, supervised ViT-S); loader; one GPU as one rank
#   scripts/gpu/run.sh 3 OUT     all methods on CIFAR-10, MINUTES (4) each; called again, it goes on where it was stopped
#   scripts/gpu/run.sh dry OUT   all parts on a CPU with tiny sizes, to know that they work
#
# OUT gets partN.json and partN.txt. PYTHON is the interpreter (python3), PACK what scripts/gpu/pack.sh made (.gpu-pack): its
# wheels are installed where the interpreter has no jsonargparse. Exit status 1 where a check failed; what follows it still runs.
set -uo pipefail
cd "$(dirname "$0")/../.."
[ $# -eq 2 ] || { sed -n '2,12p' "$0" >&2; exit 2; }
part=$1 out=$2
python=${PYTHON:-python3} pack=${PACK:-.gpu-pack}
mkdir -p "$out"
out=$(cd "$out" && pwd)
"$python" -c "import jsonargparse" 2>/dev/null || "$python" -m pip install --quiet --no-index --no-deps "$pack"/wheels/*.whl
export PYTHONPATH=src PYTHONUNBUFFERED=1
failed=0

# step PART NAME SECONDS COMMAND...: what it prints goes to partN.txt, lines that are JSON objects to partN.json too
step() {
    local number=$1 name=$2 seconds=$3 began=$SECONDS status
    shift 3
    echo "=== $name: $*" | tee -a "$out/part$number.txt"
    timeout --signal INT --kill-after 20 "$seconds" "$@" 2>&1 | tee -a "$out/part$number.txt" \
        | "$python" scripts/gpu/collect.py "$out/part$number.json" "$name"
    status=${PIPESTATUS[0]}
    # a comparison that the clock stopped has kept what it made
    if [ "$name" = compare ] && { [ "$status" -eq 124 ] || [ "$status" -eq 130 ]; }; then status=0; fi
    echo "=== $name: status $status after $((SECONDS - began)) s" | tee -a "$out/part$number.txt"
    [ "$status" -eq 0 ] || failed=1
}

measure() { # PART NAME SECONDS MORE...
    step "$1" "$2" "$3" "$python" scripts/gpu/measure.py "$2" "${@:4}"
}

part1() {
    step 1 tests 200 "$python" -m pytest -q -p no:cacheprovider -o addopts="" -m cuda tests
    measure 1 steps 170 "$@"
    measure 1 precision 140 "$@"
}

part2() {
    measure 2 peak 240 "$@"
    measure 2 loader 120 "$@"
    measure 2 ranks 120 "$@"
}

part3() {
    measure 3 compare 520 --minutes "${MINUTES:-4}" --data "$pack/data" "$@"
}

case $part in
    1) part1 ;;
    2) part2 ;;
    3) part3 ;;
    dry) part1 --dry; part2 --dry; MINUTES=0.03 part3 --dry ;;
    *) echo "no part '$part': 1, 2, 3 or dry" >&2; exit 2 ;;
esac
exit $failed
