#!/usr/bin/env bash
# Stage 2 on several machines under Slurm: one torchrun agent on each, which start a process per GPU and meet on the first.
#
#     sbatch --nodes 4 runs/slurm.sh stage2_lora.py --model eva_e --out out/visft_e
#
# The command is any script of this repository with its options. A job that is started again, by Slurm or by you, goes on
# where it was: scripts that have --resume get it, which without a checkpoint begins at the beginning, and refuses another
# run's; the others begin again. The number of machines may be another then (more ranks with smaller batches are the same
# run). Without Slurm, run the srun line's torchrun on every machine, with one --rdzv-id and the first machine's name as
# --rdzv-endpoint.
#SBATCH --job-name visft
#SBATCH --nodes 2
#SBATCH --ntasks-per-node 1
#SBATCH --gpus-per-node 8
#SBATCH --cpus-per-task 64
#SBATCH --time 48:00:00
#SBATCH --requeue
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?this is a Slurm job: sbatch runs/slurm.sh SCRIPT OPTIONS...}"
[ $# -gt 0 ] || { echo "slurm.sh: which script? sbatch runs/slurm.sh stage2_lora.py OPTIONS..." >&2; exit 2; }
HOSTS=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
RESUME=
case ${1##*/} in stage1_heads.py | stage2_lora.py | eval_ocr.py | eval_vqa.py | eval_caption.py) RESUME=--resume ;; esac
case " ${*:2} " in *" --head"[\ =]* | *" --results"[\ =]*) RESUME= ;; esac # they score what is there
srun --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "${SLURM_GPUS_ON_NODE:-8}" \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "${HOSTS%%$'\n'*}:29500" "$@" $RESUME
