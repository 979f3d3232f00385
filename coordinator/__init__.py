"""The conductor: preflight, schema, planning, phases, cutover, verify and the command line."""
