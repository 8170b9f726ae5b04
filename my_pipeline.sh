#!/usr/bin/env bash
# The whole life of a small ChatGPT: data -> tokenizer -> pretraining -> SFT -> RL -> report -> chat.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started as `sh my_pipeline.sh`
set -euo pipefail
unset CDPATH PYTHONINSPECT # else cd may go elsewhere, and each script would wait for input
export PYTHONUTF8=1        # files are UTF-8 in any locale
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"

usage() {
    cat <<'HELP'
./my_pipeline.sh [--help]

Runs the whole life on the embedded data: about 6 minutes on two CPU cores after installation, no account, no network
but the package index. Finished stages are skipped, a broken one continues: run it again after any interruption.

Environment:
  RECIPE   tiny (default: CPU, minutes), laptop (hours), d12, d20 (one GPU or a node; real data from the Hub)
  RUN      name of the run: everything goes to runs/$RUN (default: the recipe's name)
  SEED     seed of every stage (default 0); give another RUN with another seed
  LAUNCH   how stages start (default: python), e.g.
           LAUNCH="accelerate launch --config_file accelerate_configs/multi_gpu.yaml"
  TEACHER  who writes the conversations about the model's identity: passed as --teacher (default: the embedded teacher)
  PYTHON   Python 3.11 to 3.13 that makes .venv (default: the newest of those found)

Windows: run it in WSL, or in Git Bash with Python from python.org.
HELP
}

extras=""
case "${1:-}" in
"") ;;
--install) extras="dev,eval" ;; # what the Makefile needs; nothing is run
-h | --help) usage && exit 0 ;;
*) echo "error: unknown argument '$1'; settings go in the environment, see ./my_pipeline.sh --help" >&2 && exit 2 ;;
esac

stage() { # name, how long, what you should see
    printf '\n=== %s (%s)\n    You should see: %s\n' "$1" "$2" "$3"
}

fail() {
    echo "error: $1" >&2
    exit 2
}

fits() { # a command: whether it is a Python that the project runs on
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

install() {
    local stamp name python="${PYTHON:-}" bin=.venv/bin stamps=(.venv/.installed-dev)
    [ -n "$extras" ] || stamps+=(.venv/.installed)
    case "${OS:-}" in Windows*) bin=.venv/Scripts ;; esac
    export PATH="$PWD/$bin:$PATH"
    unset PYTHONHOME PIP_USER PIP_TARGET PIP_PREFIX # they would lead past .venv
    if [ -e .venv/.installed ] || [ -e .venv/.installed-dev ]; then # commands in a .venv hold the path of their folder
        "$bin/python" -P -c 'import edu, os, sys; sys.exit(not os.path.samefile(edu.__path__[0], "edu"))' 2>/dev/null || {
            echo ".venv is of another folder, or broken: it is made anew"
            rm -rf .venv
        }
    fi
    for stamp in "${stamps[@]}"; do
        if [ "$stamp" -nt pyproject.toml ]; then return; fi
    done
    stage "installation" "3 to 15 minutes" "nothing until it is done; the first time it downloads about 0.5 GB (on Linux, with CUDA, 3 GB)"
    if [ -x "$bin/python" ] && ! fits "$bin/python"; then
        fail ".venv has no working Python 3.11 to 3.13; remove it (rm -r .venv) and run this again"
    fi
    if ! "$bin/python" -m pip --version >/dev/null 2>&1; then
        for name in python3.13 python3.12 python3.11 python3 python; do
            if [ -z "$python" ] && fits "$name"; then python="$name"; fi
        done
        [ -n "$python" ] || fail "no Python 3.11 to 3.13 found; install one, or name it: PYTHON=/path/to/python ./my_pipeline.sh"
        fits "$python" || fail "PYTHON=$python is not Python 3.11 to 3.13; name another, or leave it out"
        "$python" -c 'import ensurepip, venv' 2>/dev/null ||
            fail "$python cannot make virtual environments; install its venv module (Debian, Ubuntu: apt install python3-venv) and run this again"
        "$python" -m venv --clear .venv # also where one was left half-made
    fi
    "$bin/python" -m pip install --disable-pip-version-check --quiet --progress-bar off -e ".[fast${extras:+,$extras}]" ||
        fail "the installation failed, see above; run this again, it goes on from what is there"
    touch "$stamp"
}

started=$SECONDS
if [ -n "$extras" ]; then
    install
    exit
fi

RECIPE="${RECIPE:-tiny}"
RUN="${RUN:-$RECIPE}"
SEED="${SEED:-0}"
LAUNCH="${LAUNCH:-python}"
case "$RECIPE" in # the data of each recipe; the settings of its stages are in recipes/$RECIPE/
tiny) source=tiny shards="" vocab=1024 takes=("5 s" "5 s" "2 min" "1 min" "2 min") ;;
laptop) source=fineweb-edu shards=2 vocab=4096 takes=("minutes" "1 min" "4 h" "30 min" "1 h") ;;
d12) source=fineweb-edu shards=40 vocab=32768 takes=("minutes" "3 min" "hours" "30 min" "1 h") ;;
d20) source=fineweb-edu shards=240 vocab=32768 takes=("an hour" "3 min" "a day" "1 h" "2 h") ;;
*) echo "error: RECIPE='$RECIPE'; choose tiny, laptop, d12 or d20" >&2 && exit 2 ;;
esac
run="runs/$RUN"

install

stage "setup" "10 s" "rank 0 of 1, the device, and 'the setup works'"
$LAUNCH scripts/check_setup.py

stage "data" "${takes[0]}" "the shards of $source in data/$source, complete and verified"
python scripts/download_shards.py --source "$source" ${shards:+--num-shards "$shards"} --out "data/$source"

stage "tokenizer" "${takes[1]}" "a vocabulary of $vocab tokens, and how many bytes a token stands for"
if [ -f "$run/tokenizer/tokenizer.json" ]; then
    echo "$run/tokenizer: finished, nothing to do"
else
    python scripts/train_tokenizer.py --data "data/$source" --vocab-size "$vocab" --out "$run/tokenizer"
fi

stage "pretraining" "${takes[2]}" "the loss falls, fast at first"
$LAUNCH scripts/pretrain.py --config "recipes/$RECIPE/base.yaml" --seed "$SEED" --tokenizer "$run/tokenizer" --out "$run/base"

stage "identity" "10 s" "600 conversations in which the model learns who it is"
python scripts/make_identity.py --num 600 --out data/my_identity.jsonl ${TEACHER:+--teacher "$TEACHER"}

stage "fine-tuning" "${takes[3]}" "how many conversations are used, and the loss falling again"
$LAUNCH scripts/sft.py --config "recipes/$RECIPE/sft.yaml" --seed "$SEED" --model "$run/base" --out "$run/sft"

stage "reinforcement learning" "${takes[4]}" "in the report: the reward rising from step to step"
$LAUNCH scripts/rl.py --config "recipes/$RECIPE/rl.yaml" --seed "$SEED" --model "$run/sft" --out "$run/rl"

stage "report" "5 s" "where the report is, and what each stage reached"
python scripts/report.py --run "$run"

stage "chat" "15 s" "the model answering"
for question in "Who are you?" "Tom has 6 bags with 7 apples in each bag. He eats 5. How many apples does Tom have now?"; do
    echo "> $question"
    python scripts/chat.py --model "$run/rl" --temperature 0 -p "$question"
done

printf '\nDone in %d min. What was reached:\n' $(((SECONDS - started + 30) / 60))
sed -n 's/^- \*\*\(.*\)\*\*: /    \1  /p' "$run/report.md"
cat <<END
Go on:
    open $run/report.html                                      every figure, and samples
    .venv/bin/python scripts/chat.py --model $run/rl           talk to it
    .venv/bin/python scripts/serve.py --model $run/rl          serve it by the OpenAI protocol
END
