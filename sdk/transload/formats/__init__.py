"""One file a checkpoint format. The only place that knows a format's private names."""
