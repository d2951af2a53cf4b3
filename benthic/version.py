"""The version, where every package may import it from: the root package names what stands above them."""

VERSION = "0.1.0"
