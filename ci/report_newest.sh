#!/usr/bin/env bash
# Opens, updates or closes the issue about the newest vLLM. RESULT is the result of the job that ran on it.
set -euo pipefail
label=newest-vllm
run="$GITHUB_SERVER_URL/$GITHUB_REPOSITORY/actions/runs/$GITHUB_RUN_ID"
number=$(gh issue list --label "$label" --state open --limit 1 --json number --jq '.[].number')
if [ "$RESULT" = success ]; then
  if [ -n "$number" ]; then
    gh issue close "$number" --comment "The newest vLLM passes: $run"
  fi
elif [ -n "$number" ]; then
  gh issue comment "$number" --body "The newest vLLM fails again: $run"
else
  gh label create "$label" --force --description "The weekly run on the newest vLLM"
  gh issue create --label "$label" --title "The tests fail on the newest vLLM" \
    --body "Run: $run. Its artifact \`logs\` has the output and the versions. What to do: docs/new-release.md"
fi
