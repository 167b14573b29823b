#!/usr/bin/env bash
# Installs the package, with pinned versions, on a node of Ubuntu 24.04 or Debian 12 or newer.
# The launcher files copy the package to ~/qvpo_rllib and run this there; run again, it does little.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$HOME/qvpo-venv

# g++ and Python's headers: torch.compile. libegl1: `qvpo record`.
packages=(python3-venv python3-dev g++ rsync libegl1)
if ! dpkg-query -W "${packages[@]}" >/dev/null 2>&1; then
  sudo apt-get update -qq
  sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    "${packages[@]}"
fi
python3 -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed"'
test -x "$venv/bin/python" || python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check -c cluster/constraints.txt \
  -e ".[cluster,serve,optuna]" "$@"

# Ray runs its commands through an interactive login shell, which reads ~/.bashrc.
for line in "export PATH=\"$venv/bin:\$PATH\"" "export RAY_AUTH_MODE=token"; do
  grep -qxF "$line" ~/.bashrc || echo "$line" >>~/.bashrc
done
