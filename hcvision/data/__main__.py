"""``python -m hcvision.data ROOT`` gets Fashion-MNIST."""

from hcvision.data.fashion import main

main()
