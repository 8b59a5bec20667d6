"""How small networks with gates are trained from the command line, each as its paper does it."""

TO_HALF = ("--method", "target_rate", "--gate-target", "0.5", "--gate-weight", "4", "--epochs", "3")
LARGER = ("--knob", "widths=8,12", "--knob", "blocks=2")
SMALL = ("--knob", "widths=4,8", "--knob", "blocks=1", "--epochs", "1")
TINY_LAYERS = ("--knob", "depth=4", "--knob", "width=16", "--knob", "heads=2", "--knob", "grid=2", "--epochs", "1")
GATED: dict[str, tuple[str, ...]] = {
    "skipnet": ("skipnet", *LARGER, *TO_HALF),
    "skipnet_feed_forward": ("skipnet", "--gates", "feed_forward", *SMALL, "--method", "hybrid_policy_gradient"),
    "convnet_aig": ("convnet_aig", *LARGER, *TO_HALF),
    "semantic_hashing": ("convnet_aig", "--gate-relaxation", "semantic_hashing", *SMALL, "--method", "target_rate"),
    "blockdrop": ("blockdrop", *SMALL, "--method", "curriculum_policy_gradient"),
    "ddi": ("ddi", *SMALL, "--method", "resource"),
    "layerdrop": ("layerdrop", *TINY_LAYERS),
    "stochastic_depth": ("stochastic_depth", *SMALL),
}
"""What `offramp train` is told after `--network`. Gates that open for half of the images make rows disagree."""
