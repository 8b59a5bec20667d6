"""HTTP: bodies and fields in, answers, events and problems out. Two front doors onto one engine."""
