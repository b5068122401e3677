// The attributes of the pretended device, by CUDA's number; runtime and driver tell the same.
#pragma once

inline int attribute(int a) {
  switch (a) {
    case 1:
      return 1024;
    case 2:
    case 3:
      return 1024;
    case 4:
      return 64;
    case 5:
      return 2147483647;
    case 6:
    case 7:
      return 65535;
    case 8:
      return 49152;
    case 9:
      return 65536;
    case 10:
      return 32;
    case 12:
      return 65536;
    case 13:
      return 1980000;
    case 16:
      return 132;
    case 36:
      return 2619000;
    case 37:
      return 5120;
    case 38:
      return 52428800;
    case 39:
      return 2048;
    case 41:
      return 1;
    case 75:
      return 9;
    case 76:
      return 0;
    case 81:
      return 233472;
    case 82:
      return 65536;
    case 83:
      return 1;
    case 88:
    case 89:
      return 1;
    case 95:
      return 1;
    case 97:
      return 232448;
    case 106:
      return 32;
    case 115:
      return 1;
    case 120:
      return 1;
  }
  return 0;
}
