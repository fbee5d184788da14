import sys

from workbench.quality.formats import main

sys.exit(main())
