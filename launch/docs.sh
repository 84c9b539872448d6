#!/usr/bin/env bash
# Builds the site into site/, warnings as errors. site/index.html can be read from the disk; for its
# search, python -m http.server --directory=site. Arguments go on to mkdocs.
# See launch/environment.sh for PYTHON and MASS_DPO_VENV.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

install docs "-e .[docs]"
# What it warns of is that mkdocs 2 will be another program; setup.cfg keeps to 1.
export NO_MKDOCS_2_WARNING=1
exec "$venv/bin/mkdocs" build --strict --quiet "$@"
