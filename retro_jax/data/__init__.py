"""From documents to batches: corpora, vocabulary, chunks, records, tasks."""
