"""What all sides agree on: LSNs, relations, the segment format, state, settings, errors, PostgreSQL and Kafka edges."""
