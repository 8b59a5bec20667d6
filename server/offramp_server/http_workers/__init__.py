"""HTTP in several processes in front of one engine: `offramp serve --http-workers N`.

    client ──HTTP──▶ worker process ──channel, arena──▶ engine process (device, scheduler, repository, metrics)

A worker parses, decodes, validates and serialises. It holds manifests and calibrations and never a session. What it
asks of the engine travels over a Unix socket as small messages, and tensors through memory that the two share.

    messages     what travels, and its encoding          channel      frames on a socket
    arena        which bytes of the memory are whose     tensors      a request's inputs in it
    worker       one worker process                      remote       the engine as a worker sees it
    port         one worker as the engine sees it        hub          what all ports share: models, catalogue
    relay        requests that only the engine can answer, passed on whole
    processes    starts workers, restarts them, stops them
    serve        puts the engine's process together

Two invariants: every byte of an arena has one owner at a time, and the death of a process on either side of a channel
ends what it was asked or has asked: a worker's requests are cancelled, an engine's are answered with 503.
"""
