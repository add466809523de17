#!/usr/bin/env bash
# Install gpt3jax into its own virtual environment, in the image or on a bare machine.
#
#   launch/install.sh [cuda13|cuda12|cpu] [FOLDER]     (default: cuda13 .venv)
#
# As root on Debian or Ubuntu it installs missing packages with apt: Python, and for GPUs the
# libraries of InfiniBand, without which NCCL silently uses the slow network. CUDA comes with JAX's
# wheels, so a machine needs only NVIDIA's driver.
# PYTHON=FILE selects an interpreter other than python3, 3.11 to 3.13. Versions are pinned in
# launch/constraints.txt; an empty CONSTRAINTS= installs the newest.
set -euo pipefail

kind=${1:-cuda13} folder=${2:-.venv}
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
constraints=${CONSTRAINTS-$repository/launch/constraints.txt}
python=${PYTHON:-python3}

case $kind in
  cuda13 | cuda12) package="${repository}[$kind,triton]" ;;
  cpu) package=$repository ;;
  *)
    echo "usage: $0 [cuda13|cuda12|cpu] [FOLDER]; $kind is none of the three" >&2
    exit 2
    ;;
esac

# Debian's Python lacks the module that makes virtual environments.
python_serves() {
  "$python" -c 'import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null
}

packages=()
python_serves || packages+=(python3 python3-venv)
if [ "$kind" != cpu ] && ! /sbin/ldconfig -p 2>/dev/null | grep libibverbs.so.1 >/dev/null; then
  packages+=(libibverbs1 ibverbs-providers librdmacm1)
fi
if [ ${#packages[@]} -gt 0 ] && [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
  apt-get update -q
  DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "${packages[@]}"
  rm -rf /var/lib/apt/lists/*
fi
if ! python_serves; then
  echo "$python is not a Python 3.11, 3.12 or 3.13 with venv: install one, or set PYTHON" >&2
  exit 2
fi

[ -x "$folder/bin/python" ] || "$python" -m venv "$folder"
python=$(cd "$folder/bin" && pwd)/python
"$python" -m pip install --quiet --no-cache-dir ${constraints:+--constraint "$constraints"} "$package"
cd / # so that Python imports the installed package, not the repository's folder gpt3jax
"$python" -m gpt3jax.main --help >/dev/null
echo "gpt3jax is installed: $python -m gpt3jax.main --config=RECIPE.py"
