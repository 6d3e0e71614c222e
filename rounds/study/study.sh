#!/usr/bin/env bash
# Does it make the model better? Questions, each answered by a table with intervals and generated tokens.
#
#   bash rounds/study/study.sh [--tiny | --gpu] [--seed N] [--out FOLDER] [QUESTION ...] [key=value ...]
#
#   1   four rounds of search against plain expert iteration at equal tokens, from one base
#   2   the last policy under the PPM of each round
#   3   greedy, majority, best-of-n, beam and MCTS by PPM, PQM or ORM, at equal tokens
#   4   where the gain comes from: which solutions are trained on, failed steps dropped or kept, the UCT rule
#   5   more trajectories
#   6   outcome verifiers, Flow-DPO and Orca 2 beside rStar-Math (the only one that key=value is for)
#   hard      question 1 again on families that the base can hardly solve, where sampling rarely succeeds
#   no-ppm    the rounds of question 1 that search with a PPM, without one
#   orders    the same rows trained in three orders: how much of a difference is luck
# Without a question: all, in this order; all but "hard" go on from the models of 1. What is finished is not run again.
# Runs live in runs/study[-tiny|-gpu]/; tables and JSON go to rounds/results/<date>-<machine>/ (--tiny: beside the runs).
#
#   --tiny    on a toy model, in minutes: shows that the script works, and nothing else
#   --gpu     ten times the training problems and 700 held out, for a CUDA GPU; all questions but 6 and hard
#   --seed N  other problems, another training order (default 0)
set -euo pipefail
unset CDPATH # cd would print where it went
here="$(cd "$(dirname "$0")" && pwd)/$(basename "$0")"
cd "$(dirname "$here")/../.."
case " $* " in *" --help "* | *" -h "*) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$here"; exit 0 ;; esac
. rounds/environment.sh

make_environment .venv-study quickstart,lora
exec .venv-study/bin/python rounds/study/study.py "$@"
