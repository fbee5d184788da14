import sys

from engine.quantize.run import main

sys.exit(main())
