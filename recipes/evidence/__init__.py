"""When a flat minimum pays: the runs and the verdicts of docs/evidence_protocol.md."""
