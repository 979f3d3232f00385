"""The source's side: slot, publications, replication stream, routing into lanes, publishing to Kafka."""
