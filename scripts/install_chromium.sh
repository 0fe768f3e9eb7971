#!/bin/sh
# Makes sure that the browser tests find a Chromium: one that is there, else the distribution's
# (as root), else Playwright's own. Usage: install_chromium.sh PYTHON
set -eu
for name in chromium chromium-browser google-chrome; do
    if command -v "$name" >/dev/null 2>&1; then exit 0; fi
done
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    apt-get update -qq && apt-get install -y -qq chromium >/dev/null && exit 0
fi
exec "$1" -m playwright install chromium
