# Plain resources of one provider rather than community modules: every line that costs money or grants a right can be read here, and
# `terraform validate` and the tests need this provider alone. What lives inside the cluster (node pools, storage class, the release)
# comes out as manifests and Helm values (outputs.tf) instead of through more providers, which could not be planned before the
# cluster exists.

terraform {
  required_version = ">= 1.11.0"

  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = "~> 5.100"
    }
  }
}

provider "aws" {
  region = var.region

  default_tags {
    tags = local.tags
  }
}
